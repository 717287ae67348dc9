"""One client's HTTP/1.1 connection: turns, back-pressure and timeouts. Knows no API."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from gateway.config import Limits
from gateway.errors import GatewayError, TooSlow, UploadsFull
from gateway.head_cache import HeadCache
from gateway.http_parser import Request, RequestParser, Stage
from gateway.http_response import CONTINUE, LAST_CHUNK, NO_BODY, head, head_until_close
from gateway.uploads import Uploads

_LINGER_S = 2.0  # for a client that still sends what was refused
_BODY_BYTES_PER_S = 64 * 1024
_MAX_PIPELINED = 8


class Source(Protocol):
    """Where an answer comes from that is not there at once."""

    def pause(self) -> None:
        """Send nothing for now: the client does not keep up."""

    def resume(self) -> None:
        """Go on."""

    def client_left(self) -> None:
        """Nobody waits for the answer any more."""


class Application(Protocol):
    """What a server serves."""

    def answer(self, request: Request, to: HttpConnection) -> None:
        """Answer `request`, now or, after `to.follow(source)`, later."""

    def refuse(self, error: GatewayError, to: HttpConnection) -> None:
        """Answer what is no request, or none that can be taken."""


@dataclass(slots=True)
class Shared:
    """What the connections of one server have in common."""

    application: Application
    limits: Limits
    loop: asyncio.AbstractEventLoop
    uploads: Uploads
    connections: set[HttpConnection] = field(default_factory=set)
    heads: HeadCache = field(default_factory=HeadCache)
    all_gone: asyncio.Event = field(default_factory=asyncio.Event)

    def left(self, connection: HttpConnection) -> None:
        """`connection` is closed."""
        self.connections.discard(connection)
        if not self.connections:
            self.all_gone.set()


class HttpConnection(asyncio.Protocol):
    """Answers a client's requests one at a time, in their order.

    Applications answer with `respond`, or with `start`, `write` ... and `finish`, or `abort`.
    """

    __slots__ = (
        *("_answering", "_body_since", "_chunked", "_deadline", "_keep_alive", "_lingering"),
        *("_owes_continue", "_parser", "_progress_at", "_reading_paused", "_request", "_shared"),
        *(
            "_source",
            "_stalled",
            "_taking",
            "_transport",
            "_turns",
            "_unsent_bytes",
            "_waiting_bytes",
            "_write",
            "started",
        ),
    )

    def __init__(self, shared: Shared) -> None:
        self.started = False
        self._shared = shared
        self._transport: asyncio.Transport
        self._write: Callable[[bytes], None] = _nowhere
        self._parser: RequestParser | None = None
        self._turns: deque[Request | GatewayError] = deque()
        self._waiting_bytes = 0  # of their bodies
        self._request: Request | None = None
        self._answering = self._taking = False
        self._source: Source | None = None
        self._keep_alive = self._chunked = True
        self._stalled = self._reading_paused = self._owes_continue = self._lingering = False
        self._deadline = math.inf  # for the client to send something
        self._body_since = 0.0
        self._unsent_bytes = 0
        self._progress_at = 0.0

    @property
    def num_unsent_bytes(self) -> int:
        """What the client has not taken yet."""
        return self._transport.get_write_buffer_size()

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Send a whole answer. `headers` are lines that each end in CRLF."""
        self.started = True
        start = head(status, headers, keep_alive=self._keep_alive, length=len(body))
        asked_for_head = self._request is not None and self._request.head.method == b"HEAD"
        self._write(start if asked_for_head else start + body)
        self._answered()

    def start(self, status: int, headers: bytes) -> None:
        """Send the head of an answer whose body comes with `write`, up to `finish`."""
        self.started = True
        knows_chunks = self._request is None or self._request.head.version != "1.0"
        has_body = status not in NO_BODY
        self._chunked = knows_chunks and has_body
        if knows_chunks or not has_body:
            self._write(head(status, headers, keep_alive=self._keep_alive))
        else:
            self._keep_alive = False
            self._write(head_until_close(status, headers))

    def write(self, data: bytes) -> None:
        """Send a part of a body, which is not empty."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    @property
    def write_chunks(self) -> Callable[[bytes], None] | None:
        """For what has HTTP's chunks around it already; None if this client knows none.

        To be had once the answer has started, and to be used no more once the client has left.
        """
        return self._write if self._chunked else None

    def finish(self) -> None:
        """The body is complete."""
        if self._chunked:
            self._write(LAST_CHUNK)
        self._answered()

    def abort(self) -> None:
        """Drop the connection, so that the client knows that the answer is not whole."""
        self._transport.abort()

    def follow(self, source: Source) -> None:
        """`source` will answer. It is told when the client does not keep up, and when it leaves."""
        self._source = source
        if self._stalled:
            source.pause()

    def forsake(self) -> None:
        """What would answer is not waited for any more."""
        source, self._source = self._source, None
        if source is not None:
            source.client_left()

    def close_after(self) -> None:
        """The answer to come is the last one on this connection."""
        self._keep_alive = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came. Called by the event loop, as what follows."""
        shared = self._shared
        self._transport = transport  # type: ignore[assignment]
        self._write = self._transport.write
        self._parser = RequestParser(
            shared.limits, shared.heads, self._turn, self._expects_continue
        )
        self._deadline = shared.loop.time() + shared.limits.idle_timeout_s
        shared.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        parser = self._parser
        if parser is None:
            return  # refused: what it still sends is not read
        before = parser.stage
        try:
            parser.feed(data)
        except GatewayError as error:
            self._refuse(error)
            return
        if parser.stage is not Stage.IDLE:
            self._expect_more(parser.stage, before)
        if before is Stage.BODY or parser.stage is Stage.BODY or self._turns:
            self._count_upload()

    def eof_received(self) -> None:
        """The client sends no more: as most servers do, take it for gone."""

    def connection_lost(self, _error: Exception | None) -> None:
        """The client left, or the connection was closed here."""
        self._shared.left(self)
        self._read_no_more()
        self._turns.clear()
        self._waiting_bytes = 0
        self._count_upload()
        self._write = _nowhere
        self.forsake()

    def pause_writing(self) -> None:
        """The client does not keep up."""
        self._stalled = True
        self._unsent_bytes, self._progress_at = 0, self._shared.loop.time()
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        """The client keeps up again."""
        self._stalled = False
        if self._source is not None:
            self._source.resume()

    def refuse_upload(self, error: UploadsFull) -> None:
        """See `Uploader`. What waits for its turn is dropped too: clients ask it again elsewhere."""
        self._turns.clear()
        self._waiting_bytes = 0
        self._refuse(error)

    def close_if_idle(self) -> None:
        """Close unless a request is being answered."""
        if not self._answering:
            self._close()

    def end(self) -> None:
        """Stop what is being answered, and close."""
        self.forsake()
        self._transport.abort()

    def check(self, now: float) -> None:
        """Called every second or so: end what takes too long."""
        if now > self._deadline:
            self._deadline = math.inf
            self._took_too_long()
        if self._stalled or self._transport.is_closing():
            unsent = self._transport.get_write_buffer_size()
            if unsent != self._unsent_bytes:
                self._unsent_bytes, self._progress_at = unsent, now
            elif now > self._progress_at + self._shared.limits.send_timeout_s:
                self._transport.abort()

    def _took_too_long(self) -> None:
        parser = self._parser
        if parser is None:
            self._transport.abort()
        elif parser.stage is Stage.IDLE:
            self._close()
        else:
            what = "headers" if parser.stage is Stage.HEAD else "body"
            self._refuse(TooSlow(f"the request's {what} did not arrive in time"))

    def _expect_more(self, stage: Stage, before: Stage) -> None:
        """A request is incomplete: set the time by which more of it must be there."""
        limits, parser = self._shared.limits, self._parser
        if parser is None or self._reading_paused:
            return
        now = self._shared.loop.time()
        new = before is not stage or self._deadline == math.inf
        if stage is Stage.BODY:
            if new:
                self._body_since = now
            more_s = parser.num_body_bytes / _BODY_BYTES_PER_S
            self._deadline = self._body_since + limits.body_timeout_s + more_s
        elif new:
            self._deadline = now + limits.header_timeout_s

    def _expects_continue(self) -> None:
        if not self._answering:
            self._write(CONTINUE)
        else:
            self._owes_continue = True

    def _count_upload(self) -> None:
        arriving = self._parser.num_body_bytes if self._parser is not None else 0
        self._shared.uploads.hold(self, arriving + self._waiting_bytes)

    def _read_no_more(self) -> None:
        """Drop what has arrived of a request."""
        if self._parser is not None:
            self._parser.close()
            self._parser = None

    def _refuse(self, error: GatewayError) -> None:
        self._read_no_more()
        self._count_upload()
        self._turn(error)

    def _turn(self, turn: Request | GatewayError) -> None:
        """`turn` is next, as soon as all before it is answered."""
        self._deadline = math.inf
        if not self._answering:
            self._take(turn)
            return
        self._owes_continue = False  # its body came without
        self._turns.append(turn)
        if isinstance(turn, Request):
            self._waiting_bytes += len(turn.body)
        if len(self._turns) == _MAX_PIPELINED:
            self._reading_paused = True
            self._transport.pause_reading()

    def _take(self, turn: Request | GatewayError) -> None:
        self.started = False
        self._answering = True
        application = self._shared.application
        if isinstance(turn, Request):
            self._request, self._keep_alive = turn, turn.head.keep_alive
            application.answer(turn, self)
        else:
            self._request, self._keep_alive = None, False
            self._lingering = True
            application.refuse(turn, self)

    def _answered(self) -> None:
        """After an answer: the next request, or the end."""
        self._answering = False
        self._source = self._request = None
        if self._transport.is_closing():
            return
        if not self._keep_alive:
            self._close()
        elif not self._turns:
            self._wait_for_more()
        elif not self._taking:
            self._take_turns()

    def _take_turns(self) -> None:
        """Answer what waits, one after the other: thousands may have come in one read."""
        self._taking = True
        while self._turns and not self._answering and not self._transport.is_closing():
            turn = self._turns.popleft()
            if isinstance(turn, Request) and turn.body:
                self._waiting_bytes -= len(turn.body)
                self._count_upload()
            self._take(turn)
        self._taking = False

    def _wait_for_more(self) -> None:
        shared, parser = self._shared, self._parser
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()
            if parser is not None:
                self._expect_more(parser.stage, Stage.IDLE)
        if parser is not None and parser.stage is Stage.IDLE:
            self._deadline = shared.loop.time() + shared.limits.idle_timeout_s
        if self._owes_continue:
            self._owes_continue = False
            self._write(CONTINUE)

    def _close(self) -> None:
        """Close when all is sent. A client that still sends gets time to read why not."""
        self._parser = None
        now = self._shared.loop.time()
        self._deadline = now + _LINGER_S if self._lingering else math.inf
        self._unsent_bytes, self._progress_at = 0, now
        if self._lingering:
            self._transport.write_eof()
        else:
            self._transport.close()


def _nowhere(_data: bytes) -> None:
    """Where an answer goes whose client has left."""
