from __future__ import annotations

import asyncio

import aiohttp
import pytest

from gateway.endpoints import EndpointTable, ServedModel
from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
    metric,
    until,
)

ASLEEP = EndpointTable(version=2, models=(ServedModel(name="chat", scalable=True),))


def ask(client: aiohttp.ClientSession, **headers: str) -> asyncio.Task[aiohttp.ClientResponse]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.ensure_future(client.post(CHAT, json=a_chat(), headers=named))


async def test_a_request_for_a_sleeping_model_is_held_until_an_endpoint_appears() -> None:
    async with an_engine() as engine, a_gateway(ASLEEP) as gateway, a_client(gateway) as client:
        asked = ask(client)
        await until(lambda: gateway.admission.queued("chat") == 1)
        load = gateway.admission.loads()["chat"]
        assert (load.queued, load.in_flight, load.requests_total) == (1, 0, 1)
        assert await metric(client, "bora_gateway_queued", model="chat") == 1

        gateway.apply(a_table(an_endpoint(engine), version=3))

        assert (await asked).status == 200
        assert gateway.admission.queued("chat") == 0
        assert await metric(client, "bora_gateway_queued", model="chat") == 0


async def test_a_held_request_is_503_when_its_time_is_up() -> None:
    limits = {"hold_timeout_s": 0.1}
    async with a_gateway(ASLEEP, limits=limits) as gateway, a_client(gateway) as client:
        response = await ask(client)

        assert response.status == 503
        assert int(response.headers["retry-after"]) > 0
        assert "still starting" in (await response.json())["error"]["message"]
        assert gateway.admission.queued("chat") == 0


async def test_a_held_request_is_503_when_the_clients_own_time_is_up() -> None:
    async with a_gateway(ASLEEP) as gateway, a_client(gateway) as client:
        response = await ask(client, x_request_timeout_s="0.1")

        assert response.status == 503
        assert int(response.headers["retry-after"]) > 0
        assert gateway.admission.queued("chat") == 0


async def test_a_model_that_lost_its_only_replica_waits_for_the_next_one() -> None:
    lost = EndpointTable(version=2, models=(ServedModel(name="chat"),))
    limits = {"replacement_timeout_s": 0.3, "hold_timeout_s": 0.0}
    async with (
        an_engine() as engine,
        a_gateway(lost, limits=limits) as gateway,
        a_client(gateway) as client,
    ):
        asked = ask(client)
        await until(lambda: gateway.admission.queued("chat") == 1)
        gateway.apply(a_table(an_endpoint(engine)))
        assert (await asked).status == 200

        gateway.apply(lost)
        assert (await ask(client)).status == 503


async def test_a_client_that_leaves_leaves_the_queue() -> None:
    async with a_gateway(ASLEEP) as gateway, a_client(gateway) as client:
        with pytest.raises(TimeoutError):
            await client.post(CHAT, json=a_chat(), timeout=aiohttp.ClientTimeout(total=0.1))

        await until(lambda: gateway.admission.queued("chat") == 0)


async def test_a_model_taken_out_of_the_table_is_404_for_those_who_wait() -> None:
    async with a_gateway(ASLEEP) as gateway, a_client(gateway) as client:
        asked = ask(client)
        await until(lambda: gateway.admission.queued("chat") == 1)

        gateway.apply(EndpointTable(version=3))

        assert (await asked).status == 404


async def test_while_all_places_are_taken_requests_wait_in_order() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine, max_in_flight=2))) as gateway,
        a_client(gateway) as client,
    ):
        asked = []
        for number in range(6):
            asked.append(ask(client, x_request_id=str(number)))
            await until(lambda n=number: len(engine.seen) + gateway.admission.queued("chat") > n)
        assert gateway.admission.queued("chat") == 4

        engine.gate.set()

        assert [(await one).status for one in asked] == [200] * 6
        assert engine.most_running == 2
        assert [seen.headers["x-request-id"] for seen in engine.seen] == list("012345")
        assert in_flight(gateway) == 0


async def test_a_full_queue_is_429_with_retry_after() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(
            a_table(an_endpoint(engine, max_in_flight=1)), limits={"max_queued": 1}
        ) as gateway,
        a_client(gateway) as client,
    ):
        asked = [ask(client), ask(client)]
        await until(lambda: gateway.admission.queued("chat") == 1)

        refused = await ask(client)

        assert refused.status == 429
        assert int(refused.headers["retry-after"]) > 0
        assert (await refused.json())["error"]["code"] == "queue_full"
        engine.gate.set()
        assert [(await one).status for one in asked] == [200, 200]


async def test_a_queue_that_does_not_move_is_503_with_retry_after() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(
            a_table(an_endpoint(engine, max_in_flight=1)), limits={"queue_timeout_s": 0.1}
        ) as gateway,
        a_client(gateway) as client,
    ):
        running = ask(client)
        await until(lambda: engine.running == 1)

        refused = await ask(client)

        assert refused.status == 503
        assert int(refused.headers["retry-after"]) > 0
        assert "busy" in (await refused.json())["error"]["message"]
        engine.gate.set()
        assert (await running).status == 200


async def test_the_clients_own_time_limit_in_the_queue_is_504() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine, max_in_flight=1))) as gateway,
        a_client(gateway) as client,
    ):
        running = ask(client)
        await until(lambda: engine.running == 1)

        assert (await ask(client, x_request_timeout_s="0.1")).status == 504

        engine.gate.set()
        assert (await running).status == 200


async def test_whoever_waits_behind_a_dead_endpoint_goes_to_the_living_one() -> None:
    """The healthy one is busy, so that the request waits for it rather than fail at the dead one."""
    async with an_engine(gate=asyncio.Event()) as engine:
        table = a_table(
            an_endpoint("http://127.0.0.1:9", id="dead"), an_endpoint(engine, max_in_flight=1)
        )
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            asked = [ask(client) for _ in range(4)]
            await until(lambda: engine.running == 1)
            await until(lambda: gateway.admission.queued("chat") == 3)
            engine.gate.set()

            assert [(await one).status for one in asked] == [200] * 4


async def test_a_new_table_keeps_running_streams_and_sends_new_requests_elsewhere() -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as old,
        an_engine() as new,
        a_gateway(a_table(an_endpoint(old, id="old"))) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat(stream=True))
        gateway.apply(a_table(an_endpoint(old, id="old", state="draining"), version=2))
        gateway.apply(a_table(an_endpoint(new, id="new"), version=3))

        assert (await ask(client)).headers["x-bora-endpoint"] == "new"
        gateway.apply(a_table(an_endpoint(old, id="old", max_in_flight=1), version=4))
        assert in_flight(gateway) == 1  # it came back, and its stream still counts
        old.word_gate.set()
        assert (await response.read()).endswith(b"[DONE]\n\n")
        await until(lambda: in_flight(gateway) == 0)


@pytest.mark.parametrize("loss", ["unreachable", "died before its answer"])
async def test_where_lost_replicas_are_replaced_a_request_waits_for_the_new_one(loss: str) -> None:
    managed = (ServedModel(name="chat", managed=True),)
    async with an_engine(die_before_answer=True) as dying, an_engine() as replacement:
        lost = dying if loss.startswith("died") else "http://127.0.0.1:9"
        before = a_table(an_endpoint(lost, id="old"), models=managed)
        async with a_gateway(before) as gateway, a_client(gateway) as client:
            asked = ask(client)
            await until(lambda: gateway.admission.queued("chat") == 1)

            after = a_table(an_endpoint(replacement, id="new"), models=managed, version=3)
            gateway.apply(after)

            assert (await asked).status == 200
            assert in_flight(gateway) == 0


async def test_a_lost_replica_that_nobody_replaces_in_time_is_503() -> None:
    table = a_table(
        an_endpoint("http://127.0.0.1:9"), models=(ServedModel(name="chat", managed=True),)
    )
    limits = {"replacement_timeout_s": 0.1}
    async with a_gateway(table, limits=limits) as gateway, a_client(gateway) as client:
        response = await ask(client)

        assert response.status == 503
        assert "no running replica" in (await response.json())["error"]["message"]


async def test_an_engine_that_hangs_up_once_is_tried_again_and_holds_nobody_up() -> None:
    managed = (ServedModel(name="chat", managed=True),)
    async with an_engine(die_at_request=1) as engine:
        table = a_table(an_endpoint(engine), models=managed)
        limits = {"suspect_s": 0.3}
        async with a_gateway(table, limits=limits) as gateway, a_client(gateway) as client:
            unlucky = ask(client)
            await until(lambda: gateway.admission.queued("chat") == 1)

            assert (await ask(client)).status == 200  # a newcomer does not wait behind it
            assert (await unlucky).status == 200
            assert len(engine.seen) == 3
            assert in_flight(gateway) == 0
