"""One exchange between a client and engines that do what a test says, without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gateway.access import Access
from gateway.admission import Admission
from gateway.answer import Answer, Listener
from gateway.call import Call, make_call
from gateway.config import Limits
from gateway.endpoints import Endpoint, EndpointTable
from gateway.errors import EngineBroke, EngineUnreachable, GatewayError
from gateway.exchange import Exchange
from gateway.metering import Meter
from gateway.plant import Plant
from gateway.record import Record
from gateway.tracing import Tracing
from tests.gateway.engines import a_table, an_endpoint

CHAT = "/v1/chat/completions"
EVENTS = [(b"content-type", b"text/event-stream")]
DONE = b"data: [DONE]\n\n"


class FakeConnection:
    """Follows the rules of `Listener`: what comes after the end or an abort is a test's mistake."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.head = self.body = b""
        self.listener: Listener | None = None
        self.aborted = self.paused = self.ended = False

    def ask(self, head: bytes, body: bytes, listener: Listener) -> None:
        assert not self.aborted
        self.head, self.body, self.listener = head, body, listener

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def abort(self) -> None:
        self.aborted, self.listener = True, None

    @property
    def is_open(self) -> bool:
        return not self.aborted and not self.ended

    @property
    def asked(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.body)
        return value

    # What the engine does

    def begins(self, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        if self.listener is not None:
            self.listener.began(an_answer(status, EVENTS if headers is None else headers))

    def says(self, data: bytes) -> None:
        if self.listener is not None:
            self.listener.received(data)

    def ends(self) -> None:
        listener = self._done()
        if listener is not None:
            listener.ended()

    def answers(self, status: int, body: bytes = b"{}") -> None:
        listener = self._done()
        if listener is not None:
            json_type = [(b"content-type", b"application/json")]
            listener.answered(an_answer(status, json_type), body)

    def breaks(self) -> None:
        listener = self._done()
        if listener is not None:
            listener.broke(EngineBroke(f"the engine at {self.endpoint.key} broke off"))

    def is_stale(self) -> None:
        listener = self._done()
        if listener is not None:
            listener.stale()

    def _done(self) -> Listener | None:
        listener, self.listener = self.listener, None
        self.ended = True
        return listener


@dataclass
class FakeEngines:
    """Connections are made at once, but to engines that are `down`."""

    down: set[str] = field(default_factory=set)
    pooled: set[str] = field(default_factory=set)  # endpoints with an idle connection
    made: list[FakeConnection] = field(default_factory=list)

    def take(self, endpoint: Endpoint) -> FakeConnection | None:
        if endpoint.key not in self.pooled:
            return None
        self.pooled.discard(endpoint.key)
        return self._new(endpoint)

    async def connect(self, endpoint: Endpoint) -> FakeConnection:
        await asyncio.sleep(0)
        if endpoint.key in self.down:
            raise EngineUnreachable(f"no connection to {endpoint.key}")
        return self._new(endpoint)

    def _new(self, endpoint: Endpoint) -> FakeConnection:
        self.made.append(FakeConnection(endpoint))
        return self.made[-1]


class FakeClient:
    """Sees to it that it gets one answer, whole, or from its start to its end."""

    def __init__(self) -> None:
        self.state = "waits"
        self.status = 0
        self.body = b""
        self.error: GatewayError | None = None

    write_chunks = None

    def whole(self, status: int, headers: bytes, body: bytes) -> None:
        self._goes("waits", "over")
        self.status, self.body = status, body

    def start(self, status: int, headers: bytes, *, is_event_stream: bool) -> None:
        self._goes("waits", "reads")
        self.status = status

    def write(self, data: bytes) -> None:
        assert self.state == "reads", f"written to while it {self.state}"
        assert data
        self.body += data

    def finish(self) -> None:
        self._goes("reads", "over")

    def fail(self, error: GatewayError) -> None:
        assert self.state != "over"
        self.state, self.error = "over", error

    def _goes(self, before: str, after: str) -> None:
        assert self.state == before, f"{after} while it {self.state}"
        self.state = after


class CountingAccess(Access):
    """Counts those that are in."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0

    def enter(self, *_: Any) -> None:
        self.inside += 1

    def leave(self, *_: Any) -> None:
        self.inside -= 1


class Scene:
    """A gateway's inside with one call. Make it in a running event loop."""

    def __init__(
        self, table: EndpointTable, call: Call, *, limits: dict[str, Any] | None = None
    ) -> None:
        admission = Admission(Limits(**(limits or {})))
        admission.apply(table)
        self.engines = FakeEngines()
        self.client = FakeClient()
        self.access = CountingAccess()
        self.finished: list[Record] = []
        loop = asyncio.get_running_loop()
        engines: Any = self.engines
        meter = Meter()
        told = meter.finished

        def finished(record: Record) -> None:
            self.finished.append(record)
            told(record)

        meter.finished = finished  # type: ignore[method-assign]
        self.plant = Plant(admission, engines, meter, Tracing(), self.access, loop)
        self.exchange = Exchange(self.plant, call, self.client)

    @property
    def connection(self) -> FakeConnection:
        """The newest one."""
        return self.engines.made[-1]

    @property
    def in_flight(self) -> int:
        return sum(each.in_flight for each in self.plant.admission.router.snapshot(0.0))

    async def begin(self) -> None:
        self.exchange.begin()
        await settle()

    def check_end(self) -> None:
        """Nothing is left of the call."""
        assert self.in_flight == 0
        assert self.access.inside == 0
        assert not self.plant.running
        assert len(self.finished) == 1
        assert not [each for each in self.engines.made if each.is_open]
        assert len(asyncio.all_tasks()) == 1, "only the test's"


async def settle() -> None:
    """Let tasks go on that have something to do."""
    for _ in range(12):
        await asyncio.sleep(0)


def an_answer(status: int, headers: list[tuple[bytes, bytes]]) -> Answer:
    content_type = dict(headers).get(b"content-type", b"")
    return Answer(status, headers, content_type, content_type == b"application/json")


def a_call(body: dict[str, Any] | bytes | None = None, path: str = CHAT, **changes: Any) -> Call:
    if not isinstance(body, bytes):
        message = {"role": "user", "content": "hi"}
        asked = {"model": "chat", "stream": True, "messages": [message], **(body or {})}
        body = json.dumps(asked).encode()
    call = make_call("http", path, body, {}, "req-1")
    for name, value in changes.items():
        setattr(call, name, value)
    return call


def some_endpoints(count: int, **changes: Any) -> EndpointTable:
    return a_table(*(an_endpoint(f"http://e{n}:1", id=f"e{n}", **changes) for n in range(count)))


def an_event(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    chunk = {"id": "c", "created": 1, "model": "chat", "choices": [choice], **more}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def text_of(body: bytes) -> str:
    """What the events say."""
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks_of(body)
        for choice in chunk["choices"]
    )


def chunks_of(body: bytes) -> list[dict[str, Any]]:
    return list(_chunks(body.split(b"\n\n")))


def _chunks(events: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for event in events:
        if event.startswith(b"data: {"):
            yield json.loads(event[6:])
