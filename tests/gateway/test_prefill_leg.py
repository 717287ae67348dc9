"""A prompt is read by one engine and answered by another; what goes wrong between costs time only."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.endpoints import EndpointTable
from gateway.prefill_leg import read_only, with_params
from gateway.tracing import Tracing
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
from tests.gateway.exchanges import DONE, Scene, a_call, an_event, settle, text_of

COMPLETIONS = "/v1/completions"
PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "p0-engine",
    "remote_request_id": "chatcmpl-req-1-0123abcd",
    "remote_host": "10.0.0.1",
    "remote_port": 20001,
}
READ = json.dumps({"choices": [], "kv_transfer_params": PARAMS}).encode()
LONG = {"messages": [{"role": "user", "content": "The bora blows. " * 200}]}


def roles(*names: str, **changes: Any) -> EndpointTable:
    """Endpoints named by their role: p0, p1, d0, ..."""
    counts: dict[str, int] = {}
    endpoints = []
    for name in names:
        number = counts[name] = counts.get(name, -1) + 1
        short = f"{name[0]}{number}"
        endpoint = an_endpoint(f"http://{short}:1", id=short, role=name, variant=name, engine="sim")
        endpoints.append(endpoint.model_copy(update=changes))
    return a_table(*endpoints)


async def a_scene(*names: str, body: Any = None, path: str = CHAT, **limits: Any) -> Scene:
    scene = Scene(roles(*names), a_call({**LONG, **(body or {})}, path), limits=limits)
    await scene.begin()
    return scene


def finish(scene: Scene) -> None:
    """The engine that was asked last answers."""
    scene.connection.begins()
    scene.connection.says(an_event("yes", "stop") + DONE)
    scene.connection.ends()
    assert text_of(scene.client.body) == "yes"
    scene.check_end()


async def test_a_long_prompt_is_read_elsewhere_before_it_is_answered() -> None:
    scene = await a_scene("prefill", "decode")

    asked_to_read = scene.connection
    assert asked_to_read.endpoint.key == "p0"
    assert scene.client.state == "waits"
    asked_to_read.answers(200, READ)
    await settle()

    assert scene.connection.endpoint.key == "d0"
    assert scene.connection.asked["kv_transfer_params"] == PARAMS
    assert scene.connection.asked["messages"] == LONG["messages"]
    finish(scene)
    assert scene.finished[0].attempts == 1
    assert b"x-bora-prefill-endpoint: p0\r\n" in scene.finished[0].more_headers


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_engine_that_reads_is_asked_for_one_token_and_to_keep_the_cache(
    path: str,
) -> None:
    more = {"stream_options": {"include_usage": True}, "min_tokens": 5, "max_tokens": 100}
    body = {"prompt": "The bora blows. " * 200, **more} if path == COMPLETIONS else more
    scene = await a_scene("prefill", "decode", body=body, path=path)

    asked = scene.connection.asked
    assert (asked["stream"], asked["stream_options"]) == (False, None)
    assert (asked["max_tokens"], asked["min_tokens"]) == (1, 0)
    assert asked.get("max_completion_tokens") == (1 if path == CHAT else None)
    assert asked["kv_transfer_params"] == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    scene.connection.answers(200, READ)
    await settle()
    asked = scene.connection.asked
    assert (asked["stream"], asked["min_tokens"], asked["max_tokens"]) == (True, 5, 100)
    finish(scene)


async def test_a_short_prompt_is_read_where_it_is_answered() -> None:
    scene = await a_scene(
        "prefill", "decode", body={"messages": [{"role": "user", "content": "x"}]}
    )

    assert scene.connection.endpoint.key == "d0"
    assert "kv_transfer_params" not in scene.connection.asked
    finish(scene)


async def test_what_the_answering_engine_has_cached_is_not_read_elsewhere() -> None:
    scene = await a_scene("prefill", "decode", "decode")
    scene.connection.answers(200, READ)
    await settle()
    first = scene.connection.endpoint.key
    finish(scene)

    again = Scene(roles("prefill", "decode", "decode"), a_call(LONG))
    again.plant.admission = scene.plant.admission
    await again.begin()

    assert again.connection.endpoint.key == first
    assert [made.endpoint.key for made in again.engines.made] == [first]
    again.exchange.client_left()


@pytest.mark.parametrize(
    "more",
    [{"n": 2}, {"best_of": 3}, {"echo": True}, {"prompt_logprobs": 0}, {"use_beam_search": True}],
    ids=str,
)
async def test_what_one_reading_does_not_serve_is_not_read_elsewhere(more: dict[str, Any]) -> None:
    scene = await a_scene("prefill", "decode", body=more)

    assert scene.connection.endpoint.key == "d0"
    finish(scene)


@pytest.mark.parametrize(
    ("prompt", "reader"),
    [(["words " * 600], "d0"), ([[1, 2] * 600], "d0"), ([12345, 2345] * 600, "p0")],
    ids=["several texts", "several lists of ids", "one list of ids"],
)
async def test_only_a_single_prompt_is_read_elsewhere(prompt: Any, reader: str) -> None:
    scene = await a_scene("prefill", "decode", body={"prompt": prompt}, path=COMPLETIONS)

    assert scene.connection.endpoint.key == reader
    scene.exchange.client_left()


@pytest.mark.parametrize(
    "answer",
    [
        b'{"choices": []}',
        b'{"kv_transfer_params": null}',
        b"[]",
        b"no JSON",
        json.dumps({"kv_transfer_params": {**PARAMS, "remote_block_ids": []}}).encode(),
        json.dumps({"kv_transfer_params": {**PARAMS, "remote_port": None}}).encode(),
        json.dumps({"kv_transfer_params": {**PARAMS, "do_remote_prefill": False}}).encode(),
    ],
)
async def test_params_that_an_engine_could_not_fetch_by_go_nowhere(answer: bytes) -> None:
    scene = await a_scene("prefill", "decode")

    scene.connection.answers(200, answer)
    await settle()

    assert scene.connection.endpoint.key == "d0"
    assert "kv_transfer_params" not in scene.connection.asked
    finish(scene)


@pytest.mark.parametrize("fault", ["breaks", "500", "429", "400", "no JSON", "unreachable"])
async def test_a_prefill_engine_that_fails_is_not_noticed_by_the_client(fault: str) -> None:
    scene = Scene(roles("prefill", "decode"), a_call(LONG))
    if fault == "unreachable":
        scene.engines.down = {"p0"}
    await scene.begin()
    if fault == "breaks":
        scene.connection.breaks()
    elif fault == "no JSON":
        scene.connection.begins()
        scene.connection.says(an_event("what?"))
        scene.connection.ends()
    elif fault != "unreachable":
        scene.connection.answers(int(fault))
    await settle()

    assert scene.connection.endpoint.key == "d0"
    assert "kv_transfer_params" not in scene.connection.asked
    finish(scene)


@pytest.mark.parametrize("fault", ["breaks", "unreachable"])
async def test_a_prefill_engine_that_has_failed_is_left_alone_for_a_while(fault: str) -> None:
    scene = Scene(roles("prefill", "decode"), a_call(LONG))
    scene.engines.down = {"p0"} if fault == "unreachable" else set()
    await scene.begin()
    if fault == "breaks":
        scene.connection.breaks()
        await settle()
    finish(scene)

    other = {"messages": [{"role": "user", "content": "Something else. " * 200}]}
    again = Scene(roles("prefill", "decode"), a_call(other))
    again.plant.admission = scene.plant.admission
    await again.begin()

    assert [made.endpoint.key for made in again.engines.made] == ["d0"]
    finish(again)


async def test_a_prefill_engine_that_hangs_is_waited_for_only_so_long() -> None:
    scene = await a_scene("prefill", "decode", stall_timeout_s=0.01)
    hung = scene.connection

    await until(lambda: scene.connection is not hung)

    assert hung.aborted
    assert scene.connection.endpoint.key == "d0"
    finish(scene)


async def test_a_stale_connection_is_no_failure() -> None:
    scene = Scene(roles("prefill", "decode"), a_call(LONG))
    scene.engines.pooled = {"p0"}
    await scene.begin()

    scene.connection.is_stale()
    await settle()

    assert scene.connection.endpoint.key == "p0"
    scene.connection.answers(200, READ)
    await settle()
    assert scene.connection.asked["kv_transfer_params"] == PARAMS
    finish(scene)


@pytest.mark.parametrize("ticks", [0, 1, 12])
async def test_a_client_that_leaves_meanwhile_leaves_nothing_behind(ticks: int) -> None:
    scene = Scene(roles("prefill", "decode"), a_call(LONG))
    scene.exchange.begin()
    for _ in range(ticks):
        await asyncio.sleep(0)

    scene.exchange.client_left()
    await settle()

    scene.check_end()


async def test_the_clients_time_limit_holds_meanwhile_too() -> None:
    scene = Scene(roles("prefill", "decode"), a_call(LONG, timeout_s=0.01))
    await scene.begin()

    await until(lambda: scene.client.state == "over")
    await settle()

    assert scene.client.error is not None
    assert scene.client.error.status == 504
    scene.check_end()


async def test_the_answering_engine_may_die_while_the_prompt_is_read() -> None:
    scene = await a_scene("prefill", "decode", "decode")
    reading = scene.connection
    dying = next(k for k in ("d0", "d1") if scene.exchange.is_at(k))

    scene.exchange.give_up("it does not answer its health checks")
    await settle()

    assert reading.aborted
    assert scene.connection.endpoint.key == "p0"
    scene.connection.answers(200, READ)
    await settle()
    assert scene.connection.endpoint.key == ({"d0", "d1"} - {dying}).pop()
    finish(scene)


async def test_a_retry_does_not_name_a_cache_that_may_be_gone() -> None:
    scene = await a_scene("prefill", "decode", "decode")
    scene.connection.answers(200, READ)
    await settle()

    scene.connection.breaks()
    await settle()

    assert scene.connection.endpoint.key in {"d0", "d1"}
    assert "kv_transfer_params" not in scene.connection.asked
    finish(scene)


async def test_a_stream_that_moves_does_not_name_the_cache_either() -> None:
    scene = await a_scene("prefill", "decode", "decode")
    scene.connection.answers(200, READ)
    await settle()
    scene.connection.begins()
    scene.connection.says(an_event("half"))

    scene.connection.breaks()
    await settle()

    assert "kv_transfer_params" not in scene.connection.asked
    scene.connection.begins()
    scene.connection.says(an_event(" and half", "stop") + DONE)
    scene.connection.ends()
    assert text_of(scene.client.body) == "half and half"
    scene.check_end()


@pytest.mark.parametrize(
    "key", ['"kv_transfer_params"', '"kv\\u005ftransfer_params"'], ids=["plain", "escaped"]
)
@pytest.mark.parametrize("names", [("prefill", "decode"), ("prefill",)], ids=str)
async def test_a_client_may_not_name_where_engines_fetch_from(
    key: str, names: tuple[str, ...]
) -> None:
    body = json.dumps({"model": "chat", "messages": []}).encode()
    call = a_call(body[:-1] + b", " + key.encode() + b': {"remote_host": "10.0.0.9"}}')
    scene = Scene(roles(*names), call)

    await scene.begin()

    assert scene.client.error is not None
    assert (scene.client.error.status, scene.client.error.param) == (400, "kv_transfer_params")
    assert not scene.engines.made
    scene.check_end()


async def test_of_engines_that_do_all_work_nothing_is_asked_twice() -> None:
    scene = await a_scene("whole", "whole", body={"kv_transfer_params": {"x": 1}})

    assert scene.connection.asked["kv_transfer_params"] == {"x": 1}
    finish(scene)


async def test_whole_requests_go_to_a_prefill_engine_only_when_there_is_no_other() -> None:
    scene = Scene(roles("prefill"), a_call(LONG))
    await scene.begin()

    assert scene.connection.endpoint.key == "p0"
    assert "kv_transfer_params" not in scene.connection.asked
    finish(scene)


async def test_a_request_that_every_decode_engine_failed_is_answered_by_a_prefill_engine() -> None:
    scene = Scene(roles("prefill", "decode"), a_call({}))
    scene.engines.down = {"d0"}

    await scene.begin()

    assert scene.connection.endpoint.key == "p0"
    assert scene.connection.asked["stream"] is True
    finish(scene)


async def test_the_reading_is_a_span_of_its_own_that_its_engine_goes_on_from() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    scene = Scene(roles("prefill", "decode"), a_call(LONG))
    scene.plant.tracing = Tracing(provider)
    await scene.begin()
    read_head = scene.connection.head.decode()
    scene.connection.answers(200, READ)
    await settle()
    answer_head = scene.connection.head.decode()
    finish(scene)

    step, request = exporter.get_finished_spans()
    assert (step.name, request.name) == ("prefill", f"http {CHAT}")
    assert step.parent is not None
    assert step.parent.span_id == request.context.span_id
    assert step.attributes == {"bora.endpoint": "p0", "bora.outcome": "handed_over"}
    assert f"{step.context.span_id:016x}" in read_head
    assert f"{request.context.span_id:016x}" in answer_head
    provider.shutdown()


async def test_a_request_is_counted_once_while_two_engines_work_on_it() -> None:
    read = {"choices": [], "kv_transfer_params": PARAMS}
    async with (
        an_engine(name="reader", gate=asyncio.Event()) as reader,
        an_engine(name="writer") as writer,
    ):
        reader.completion = lambda *_: read  # type: ignore[method-assign]
        table = a_table(
            an_endpoint(reader, id="reader", role="prefill", variant="p"),
            an_endpoint(writer, id="writer", role="decode", variant="d"),
        )
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            ask = asyncio.ensure_future(client.post(CHAT, json=a_chat(**LONG)))
            await until(lambda: reader.running == 1)
            assert await metric(client, "bora_gateway_in_flight", model="chat") == 1
            load = gateway.admission.loads()["chat"]
            assert (load.requests_total, load.queued) == (1, 0)
            reader.gate.set()
            response = await ask

            assert response.status == 200
            assert response.headers["x-bora-endpoint"] == "writer"
            assert response.headers["x-bora-prefill-endpoint"] == "reader"
            assert writer.seen[0].json["kv_transfer_params"] == PARAMS
            name = "bora_gateway_prefill_duration_seconds_count"
            labels = {"model": "chat", "variant": "p", "outcome": "handed_over"}
            assert await metric(client, name, **labels) == 1
            assert await metric(client, "bora_gateway_requests_total", model="chat") == 1
            assert in_flight(gateway) == 0


async def test_an_engines_own_name_of_the_model_is_used_for_both_steps() -> None:
    table = roles("prefill", "decode", served_model_name="base")
    scene = Scene(table, a_call(LONG))
    await scene.begin()

    assert scene.connection.asked["model"] == "base"
    scene.connection.answers(200, READ)
    await settle()
    assert scene.connection.asked["model"] == "base"
    assert scene.connection.asked["kv_transfer_params"] == PARAMS
    finish(scene)


def test_bodies_with_blanks_at_the_end_stay_whole() -> None:
    call = a_call(b'{"model": "chat", "max_tokens": 9} \r\n')

    assert json.loads(read_only(call, call.body))["max_tokens"] == 1
    assert json.loads(with_params(call.body, b'{"a":1}'))["kv_transfer_params"] == {"a": 1}
