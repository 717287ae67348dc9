from __future__ import annotations

import asyncio
import json
import logging
import threading
import time

import pytest

from gateway.usage import Usage, find_usage
from tests.gateway.engines import (
    CHAT,
    USAGE,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    metric,
    until,
)


async def test_requests_tokens_and_latencies_are_counted_by_model_and_variant() -> None:
    labels = {"model": "chat", "variant": "v"}
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine, variant="v"))) as gateway,
        a_client(gateway) as client,
    ):
        usage = {"include_usage": True}
        for body in (a_chat(), a_chat(stream=True), a_chat(stream=True, stream_options=usage)):
            await (await client.post(CHAT, json=body)).read()

        async def value(name: str, **more: str) -> float:
            return await metric(client, f"bora_gateway_{name}", **labels, **more)

        assert await value("requests_total", api="http", status="200") == 3
        assert await value("prompt_tokens_total") == 2 * USAGE["prompt_tokens"]
        assert await value("completion_tokens_total") == 2 * USAGE["completion_tokens"]
        assert await value("time_to_first_token_seconds_count") == 2
        assert await value("request_duration_seconds_count") == 3
        assert await value("in_flight") == 0
        assert await metric(client, "bora_gateway_endpoints", model="chat") == 1
        assert await metric(client, "bora_gateway_endpoint_table_version") == 1


async def test_the_delay_of_a_table_shows_and_clocks_that_differ_do_no_harm() -> None:
    name = "bora_gateway_endpoint_table_delay_seconds"
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        assert await metric(client, f"{name}_count") == 0  # a file tells no time
        for changed_s in (time.time() - 100.0, time.time() + 100.0):
            gateway.apply(a_table(an_endpoint(engine)), changed_s)

        assert await metric(client, f"{name}_count") == 2
        assert await metric(client, f"{name}_bucket", le="0.005") == 1
        assert await metric(client, f"{name}_sum") == pytest.approx(100.0, abs=5.0)


async def test_requests_under_way_show() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        asked = asyncio.ensure_future(client.post(CHAT, json=a_chat()))
        await until(lambda: engine.running == 1)
        assert await metric(client, "bora_gateway_in_flight", model="chat") == 1
        engine.gate.set()
        await asked
        assert await metric(client, "bora_gateway_in_flight", model="chat") == 0


async def test_what_clients_invent_makes_no_new_series() -> None:
    async with a_gateway() as gateway, a_client(gateway) as client:
        for name in ("a", "b", 'c"}'):
            await client.post(CHAT, json=a_chat(model=name))
        await client.post(CHAT, data=b"{")
        text = await (await client.get("/metrics")).text()

    lines = [line for line in text.splitlines() if line.startswith("bora_gateway_requests_total")]
    assert len(lines) == 2
    assert all('model=""' in line for line in lines)


async def test_the_access_log_is_one_line_of_json(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine, id="r\n1"))) as gateway,
        a_client(gateway) as client,
    ):
        with caplog.at_level(logging.INFO, "gateway.access"):
            await client.post(CHAT, json=a_chat(), headers={"x-request-id": "abc"})
            await client.post(CHAT, json=a_chat(model="line\nbreak"))

    lines = [r.getMessage() for r in caplog.records if r.name == "gateway.access"]
    assert len(lines) == 2
    assert not any("\n" in line for line in lines)
    first, second = map(json.loads, lines)
    assert first["request_id"] == "abc"
    assert (first["status"], first["model"], first["endpoint"]) == (200, "chat", "r\n1")
    assert (first["prompt_tokens"], first["attempts"]) == (7, 1)
    assert (second["status"], second["model"]) == (404, "")


async def test_a_client_that_left_is_499() -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat(stream=True))
        await response.content.readany()
        response.close()
        await until(lambda: engine.hung_up_on == 1)

        assert await metric(client, "bora_gateway_requests_total", status="499") == 1


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"usage": {"prompt_tokens": 1, "completion_tokens": 2}}', Usage(1, 2)),
        (b'{"usage":{"input_tokens":1,"output_tokens":2}}', Usage(1, 2)),
        (b'data: {"usage" : {"prompt_tokens":4}}\n\ndata: {"usage":null}\n\n', Usage(4, 0)),
        (b'{"choices":[{"text":"\\"usage\\": {\\"prompt_tokens\\": 9}"}]}', None),
        (b'{"usage": {"prompt_tokens": 1', None),
        (b'{"usage": "much"}', None),
        (b'{"usage"', None),
        (b"{}", None),
    ],
)
def test_usage_is_found_without_parsing_everything(data: bytes, found: Usage | None) -> None:
    assert find_usage(data) == found


async def test_while_the_metrics_are_made_requests_are_answered() -> None:
    async with a_gateway() as gateway, a_client(gateway) as client:
        making, made = threading.Event(), threading.Event()

        def exposition() -> bytes:
            making.set()
            assert made.wait(20)
            return b"bora_gateway_x 1\n"

        gateway.meter.exposition = exposition  # type: ignore[method-assign]
        scrapes = [asyncio.ensure_future(client.get("/metrics")) for _ in range(2)]
        await until(making.is_set)
        scrapes[1].cancel()

        assert (await client.get("/health")).status == 200

        made.set()
        assert await (await scrapes[0]).text() == "bora_gateway_x 1\n"
        await until(lambda: gateway.num_connections <= 2)


async def test_metrics_that_cannot_be_made_are_a_500(caplog: pytest.LogCaptureFixture) -> None:
    async with a_gateway() as gateway, a_client(gateway) as client:
        gateway.meter.exposition = dict  # type: ignore[method-assign,assignment]
        gateway.meter.flush = lambda: {}["x"]  # type: ignore[method-assign]

        assert (await client.get("/metrics")).status == 500
        assert "cannot be told" in caplog.text
        gateway.meter.flush = lambda: None  # type: ignore[method-assign]
