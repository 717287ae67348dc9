"""A small real engine server, and builders of everything that a gateway needs to stand before it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from gateway.config import GatewayConfig, Limits
from gateway.endpoints import Endpoint, EndpointsFile, EndpointTable, ServedModel
from gateway.server import Gateway
from placement.spec import dump_yaml

CHAT = "/v1/chat/completions"
# A slow machine is not taken for a silent engine, and what a test waits for has no other cause.
_PATIENT = {"health_interval_s": 0, "stall_timeout_s": 1000.0, "send_timeout_s": 1000.0}
PATIENCE_S = 60.0  # for what comes in milliseconds, unless it never comes
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@dataclass
class Seen:
    """A request as the engine got it."""

    path: str
    headers: dict[str, str]
    body: bytes
    json: dict[str, Any]
    method: str = "POST"
    query: str = ""


@dataclass
class FakeEngine:
    """An OpenAI server whose every misbehaviour is a field."""

    name: str = "engine"
    url: str = ""
    status: int = 200
    words: tuple[str, ...] = ("Hello", " big", " world")
    raw_chunks: tuple[bytes, ...] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    die_before_answer: bool = False
    die_at_request: int | None = None
    die_after_headers: bool = False
    die_after_words: int | None = None
    gate: asyncio.Event | None = None  # waited for before the answer
    word_gate: asyncio.Event | None = None  # waited for after the first word
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    hung_up_on: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {k.lower(): v for k, v in request.headers.items()}
        asked = json.loads(body) if body else {}
        self.seen.append(
            Seen(request.path, headers, body, asked, request.method, request.query_string)
        )
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._answer(request)
        except (asyncio.CancelledError, ConnectionResetError):
            self.hung_up_on += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.gate:
            await self.gate.wait()
        if self.die_before_answer or len(self.seen) == self.die_at_request:
            request.transport.abort()
            return web.Response()
        if self.status != 200:
            error = {"error": {"message": f"{self.name} says no", "type": "x", "code": None}}
            return web.json_response(error, status=self.status, headers=self.headers)
        asked = self.seen[-1].json
        if request.path == "/tokenize":
            return web.json_response({"count": 5, "max_model_len": 4096, "tokens": [1, 2, 3, 4, 5]})
        if request.path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}]
            return web.json_response({"object": "list", "model": "m", "data": data})
        if asked.get("stream"):
            return await self._stream(request, asked)
        return web.json_response(self.completion(request.path, asked), headers=self.headers)

    def completion(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        text = "".join(self.words)
        if path == CHAT:
            said = {"message": {"role": "assistant", "content": text, "tool_calls": []}}
        else:
            said = {"text": text}
        choice = {"index": 0, "logprobs": None, "finish_reason": "stop", "stop_reason": 7, **said}
        return {
            "id": "cmpl-1",
            "object": "chat.completion",
            "created": 1700000000,
            "model": asked.get("model"),
            "choices": [choice],
            "usage": USAGE,
            "system_fingerprint": "fp",
        }

    def stream_chunks(self, path: str, asked: dict[str, Any]) -> list[bytes]:
        if self.raw_chunks is not None:
            return list(self.raw_chunks)
        chunks = []
        for number, word in enumerate(self.words):
            said: dict[str, Any] = {"text": word}
            if path == CHAT:
                said = {"delta": {"role": "assistant", "content": word}}
            last = "stop" if number == len(self.words) - 1 else None
            chunks.append({"choices": [{"index": 0, **said, "finish_reason": last}]})
        if (asked.get("stream_options") or {}).get("include_usage"):
            chunks.append({"choices": [], "usage": USAGE})
        common = {"id": "cmpl-1", "created": 1700000000, "model": asked["model"]}
        events = [b"data: " + json.dumps({**common, **c}).encode() + b"\n\n" for c in chunks]
        return [*events, b"data: [DONE]\n\n"]

    async def _stream(self, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        headers = {"content-type": "text/event-stream", **self.headers}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        if self.die_after_headers:
            await response.write(b"")
            request.transport.abort()
            return response
        for number, chunk in enumerate(self.stream_chunks(request.path, asked)):
            if self.die_after_words == number:
                await response.write(chunk[: len(chunk) // 2])  # half an event
                await asyncio.sleep(0.02)
                request.transport.abort()
                return response
            await response.write(chunk)
            await asyncio.sleep(0)
            if number == 0 and self.word_gate:
                await self.word_gate.wait()
        return response


@asynccontextmanager
async def running(app: web.Application) -> AsyncIterator[str]:
    """`app` on a free port; yields its URL."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def an_engine(**behaviour: Any) -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(**behaviour)
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", engine.handle)
    async with running(app) as url:
        engine.url = url
        yield engine


@asynccontextmanager
async def some_engines(count: int, **behaviour: Any) -> AsyncIterator[list[FakeEngine]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(an_engine(name=f"engine-{n}", **behaviour))
            for n in range(count)
        ]


def an_endpoint(at: FakeEngine | str, **changes: Any) -> Endpoint:
    url = at if isinstance(at, str) else at.url
    return Endpoint(**{"model": "chat", "url": url, **changes})


def a_table(*endpoints: Endpoint, **changes: Any) -> EndpointTable:
    models = tuple(ServedModel(name=name) for name in dict.fromkeys(e.model for e in endpoints))
    return EndpointTable(**{"version": 1, "models": models, "endpoints": endpoints, **changes})


@asynccontextmanager
async def a_gateway(
    table: EndpointTable | None = None, *, limits: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[Gateway]:
    """A running gateway. Its endpoints file is only where it starts from; tests apply tables."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "endpoints.yaml"
        path.write_text(dump_yaml(EndpointsFile(endpoints=(an_endpoint("http://127.0.0.1:9"),))))
        settings: dict[str, Any] = {
            "endpoints_file": path,
            "http_port": 0,
            "grpc_port": None,
            "limits": Limits(**{**_PATIENT, **(limits or {})}),
            "access_log": True,
        }
        if "controller_url" in changes:
            settings["endpoints_file"] = None
        async with Gateway(GatewayConfig(**{**settings, **changes})) as gateway:
            if table is not None:
                gateway.apply(table)
            yield gateway


@asynccontextmanager
async def a_client(gateway: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    base = f"http://127.0.0.1:{gateway.http_port}"
    async with aiohttp.ClientSession(base) as session:
        yield session


def a_chat(**changes: Any) -> dict[str, Any]:
    return {"model": "chat", "messages": [{"role": "user", "content": "hi"}], **changes}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`; fails the test if it does not come, however slow the machine is."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


def in_flight(gateway: Gateway, model: str = "chat") -> int:
    router = gateway.admission.router
    return sum(s.in_flight for key, s in router._states.items() if key[0] == model)


async def metric(client: aiohttp.ClientSession, name: str, **labels: str) -> float:
    """The sum over the series of that name that have these labels."""
    total = 0.0
    text = await (await client.get("/metrics")).text()
    for line in text.splitlines():
        series, _, value = line.rpartition(" ")
        if series.split("{")[0] == name and all(f'{k}="{v}"' in series for k, v in labels.items()):
            total += float(value)
    return total
