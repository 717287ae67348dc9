from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    running,
)

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


async def test_with_a_collector_each_request_is_a_span_that_continues_the_clients_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    received = ExportTraceServiceRequest()

    async def collect(request: web.Request) -> web.Response:
        received.MergeFromString(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    async with running(app) as url, an_engine() as engine:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        async with (
            a_gateway(a_table(an_endpoint(engine, variant="v"))) as gateway,
            a_client(gateway) as client,
        ):
            await client.post(CHAT, json=a_chat(), headers={"traceparent": PARENT})
            await client.post(CHAT, json=a_chat(model="unknown"))
        await asyncio.sleep(0)

    spans = [s for r in received.resource_spans for scope in r.scope_spans for s in scope.spans]
    first = spans[0]
    attributes = {a.key: a.value for a in first.attributes}
    assert len(spans) == 2
    assert first.name == f"http {CHAT}"
    assert first.trace_id.hex() == "a" * 32
    assert first.parent_span_id.hex() == "b" * 16
    assert attributes["gen_ai.request.model"].string_value == "chat"
    assert attributes["bora.variant"].string_value == "v"
    assert attributes["gen_ai.usage.input_tokens"].int_value == 7
    # The engine continues from our span, not from the client's.
    assert engine.seen[0].headers["traceparent"] == f"00-{'a' * 32}-{first.span_id.hex()}-01"


async def test_without_a_collector_the_clients_trace_goes_on_untouched() -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        await client.post(CHAT, json=a_chat(), headers={"traceparent": PARENT})
        await client.post(CHAT, json=a_chat())

    assert engine.seen[0].headers["traceparent"] == PARENT
    assert "traceparent" not in engine.seen[1].headers
