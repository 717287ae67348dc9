"""LoRA adapters: models of their own to clients, on engines that they share with their model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.adapters import with_adapters
from gateway.admission import Admission
from gateway.endpoints import EndpointTable, ServedModel
from gateway.routing import Router
from gateway.table_feed import table_from_file
from placement.errors import ConfigError
from tests.gateway.engines import (
    CHAT,
    FakeEngine,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
)
from tests.gateway.tenants import a_locked_gateway, a_tenant, bearer


def a_model(*adapters: str, **changes: object) -> ServedModel:
    return ServedModel(**{"name": "chat", "adapters": adapters, **changes})


def expanded(*endpoints: object, adapters: tuple[str, ...] = ("legal",)) -> EndpointTable:
    return with_adapters(a_table(*endpoints, models=(a_model(*adapters),)))


def with_legal(engine: FakeEngine) -> EndpointTable:
    """One endpoint, which calls the adapter `legal` something else."""
    endpoint = an_endpoint(engine, adapters={"legal": "legal-2"})
    return a_table(endpoint, models=(a_model("legal"),))


async def test_an_adapter_is_asked_for_by_its_name_and_answers_under_it() -> None:
    async with (
        an_engine() as engine,
        a_gateway(with_legal(engine)) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(model="legal")) as response,
    ):
        answer = await response.json()
    assert (response.status, answer["model"]) == (200, "legal")
    assert engine.seen[0].json["model"] == "legal-2"


async def test_a_stream_of_an_adapter_has_its_name_in_every_event() -> None:
    async with (
        an_engine() as engine,
        a_gateway(with_legal(engine)) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(model="legal", stream=True)) as response,
    ):
        body = await response.read()
    assert b'"legal"' in body
    assert b"legal-2" not in body


async def test_only_endpoints_that_have_it_loaded_are_asked() -> None:
    async with (
        an_engine() as without,
        an_engine() as having,
        a_gateway(
            a_table(
                an_endpoint(without),
                an_endpoint(having, adapters={"legal": "legal"}),
                models=(a_model("legal"),),
            )
        ) as gateway,
        a_client(gateway) as client,
    ):
        for _ in range(6):
            assert (await client.post(CHAT, json=a_chat(model="legal"))).status == 200
    assert (len(without.seen), len(having.seen)) == (0, 6)


async def test_models_lists_adapters_with_their_parent_and_metrics_count_them_apart() -> None:
    async with (
        an_engine() as engine,
        a_gateway(
            a_table(an_endpoint(engine, adapters={"legal": "legal"}), models=(a_model("legal"),))
        ) as gateway,
        a_client(gateway) as client,
    ):
        await (await client.post(CHAT, json=a_chat(model="legal"))).read()
        cards = (await (await client.get("/v1/models")).json())["data"]
        metrics = await (await client.get("/metrics")).text()

    assert {card["id"]: card["parent"] for card in cards} == {"chat": None, "legal": "chat"}
    assert 'bora_gateway_requests_total{api="http",model="legal",status="200"' in metrics
    assert 'bora_gateway_requests_total{api="http",model="chat"' not in metrics


async def test_an_adapter_that_is_taken_away_is_unknown_although_engines_still_have_it() -> None:
    async with (
        an_engine() as engine,
        a_gateway(
            a_table(an_endpoint(engine, adapters={"legal": "legal"}), models=(a_model(),))
        ) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat(model="legal"))
        told = (await response.json())["error"]

    assert (response.status, told["code"]) == (404, "model_not_found")
    assert "'legal' does not exist" in told["message"]


@pytest.mark.parametrize(("models", "of_adapter"), [(("legal",), 200), (("chat",), 403)])
async def test_a_keys_models_are_named_by_adapter(
    tmp_path: Path, models: tuple[str, ...], of_adapter: int
) -> None:
    table = a_table(
        an_endpoint("http://127.0.0.1:9", adapters={"legal": "legal"}), models=(a_model("legal"),)
    )
    async with an_engine() as engine:
        endpoint = table.endpoints[0].model_copy(update={"url": engine.url})
        table = table.model_copy(update={"endpoints": (endpoint,)})
        async with (
            a_locked_gateway(tmp_path, table, a_tenant(models=models)) as gateway,
            a_client(gateway) as client,
        ):
            asked = [
                (await client.post(CHAT, json=a_chat(model=name), headers=bearer("acme"))).status
                for name in ("legal", "chat")
            ]
    assert asked == [of_adapter, 403 if of_adapter == 200 else 200]


def test_an_engines_places_are_shared_by_all_its_names() -> None:
    router = Router()
    router.apply(expanded(an_endpoint("http://a", max_in_flight=2, adapters={"legal": "legal"})))

    leases = [router.reserve("chat", now=0), router.reserve("legal", now=0)]

    assert router.reserve("chat", now=0) is None
    assert router.reserve("legal", now=0) is None
    router.release(leases[0])
    assert router.reserve("legal", now=0) is not None


def test_load_counts_whatever_name_it_came_by() -> None:
    router = Router()
    endpoints = [
        an_endpoint(f"http://{name}", max_in_flight=9, adapters={"legal": "legal"}) for name in "ab"
    ]
    router.apply(expanded(*endpoints))
    busy = router.reserve("legal", now=0).endpoint.url

    assert router.reserve("chat", now=0).endpoint.url != busy


def test_requests_are_still_counted_when_adapters_come_and_go() -> None:
    router = Router()
    plain = an_endpoint("http://a", max_in_flight=9)
    adapted = plain.model_copy(update={"adapters": {"legal": "legal"}})
    router.apply(expanded(plain))
    before = router.reserve("chat", now=0)
    router.apply(expanded(adapted))
    both = [router.reserve("chat", now=0), router.reserve("legal", now=0)]

    assert [one.in_flight for one in router.snapshot(0)] == [3, 3]
    router.apply(expanded(plain))
    assert [one.in_flight for one in router.snapshot(0)] == [2]
    router.apply(expanded(adapted))
    assert [one.in_flight for one in router.snapshot(0)] == [3, 3]
    for lease in (before, *both):
        router.release(lease)
    assert [(one.in_flight, one.tokens_in_flight) for one in router.snapshot(0)] == [(0, 0)] * 2


async def test_who_waits_for_an_adapter_gets_the_place_that_its_model_leaves() -> None:
    admission = Admission()
    admission.apply(expanded(an_endpoint("http://a", max_in_flight=1, adapters={"legal": "legal"})))
    held = admission.try_acquire("chat")
    waiting = asyncio.ensure_future(admission.wait("legal"))
    behind = asyncio.ensure_future(admission.wait("chat"))
    await asyncio.sleep(0)

    admission.release(held)
    lease = await asyncio.wait_for(waiting, 1)
    admission.release(lease)

    admission.release(await asyncio.wait_for(behind, 1))


def test_a_table_without_adapters_is_not_touched() -> None:
    table = a_table(an_endpoint("http://a"))

    assert with_adapters(table) is table


def test_an_endpoints_file_names_adapters_where_they_are_loaded(tmp_path: Path) -> None:
    file = tmp_path / "endpoints.yaml"
    file.write_text("endpoints:\n- {model: chat, url: 'http://a', adapters: {legal: l1}}\n")

    table = with_adapters(table_from_file(file, 1))

    assert [(each.name, each.parent) for each in table.models] == [
        ("chat", None),
        ("legal", "chat"),
    ]
    assert table.endpoints[1].served_model_name == "l1"


def test_an_adapter_cannot_have_a_models_name(tmp_path: Path) -> None:
    file = tmp_path / "endpoints.yaml"
    file.write_text("endpoints:\n- {model: chat, url: 'http://a', adapters: {chat: l1}}\n")

    with pytest.raises(ConfigError, match="two models answer to the name 'chat'"):
        table_from_file(file, 1)
