"""One connection to an engine: a request goes out, the answer's bytes come back as they are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import httptools

from gateway.answer import Answer, Listener
from gateway.answer_cache import AnswerCache
from gateway.errors import EngineBroke

_log = logging.getLogger(__name__)
_MAX_HEAD_BYTES = 256 * 1024
_COPIED_BODY_BYTES = 64 * 1024


class EngineConnection(asyncio.Protocol):
    """Asks one thing at a time. `on_free` gets it back when an answer is complete and it may live."""

    __slots__ = (
        *("_answer", "_begun", "_between_chunks", "_body", "_done", "_had_chunk", "_head"),
        *("_head_bytes", "_heard", "_held_bytes"),
        *("_informational", "_keep_alive", "_known", "_listener", "_max_answer_bytes", "_name"),
        *("_on_free", "_parser", "_paused"),
        *("_transport", "_until_close", "closed", "idle_since", "reused", "take_chunks"),
    )

    def __init__(
        self,
        name: str,
        on_free: Callable[[EngineConnection], None],
        known: AnswerCache,
        *,
        max_answer_bytes: int = 1 << 30,
    ) -> None:
        """`max_answer_bytes`: of a JSON answer, which is held until all of it is there."""
        self.closed = self.reused = False
        self.idle_since = 0.0
        self._name = name
        self._on_free = on_free
        self._known = known
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._listener: Listener | None = None
        self._answer = Answer()
        self._head: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._head_bytes = self._held_bytes = 0
        self._max_answer_bytes = max_answer_bytes
        self._begun = self._done = self._heard = self._informational = False
        self._keep_alive = self._until_close = self._paused = False
        self._had_chunk = self._between_chunks = False  # of HTTP's chunks
        self.take_chunks: Callable[[bytes], bytes] | None = None

    def ask(self, head: bytes, body: bytes, listener: Listener) -> None:
        """Send a request; `listener` hears what comes of it.

        `take_chunks`, if it is set on the way, gets what comes between HTTP's chunks as it came, and
        returns what it does not take: of that the listener hears.
        """
        self._listener = listener
        self._answer = Answer()
        self._head, self._head_bytes, self._held_bytes = [], 0, 0
        self._body.clear()
        self._begun = self._done = self._heard = self._until_close = False
        self._had_chunk = self._between_chunks = False
        self.take_chunks = None
        if len(body) <= _COPIED_BODY_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def pause(self) -> None:
        """Leave what comes with the engine."""
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Hang up; the listener hears nothing more."""
        self._listener = self.take_chunks = None
        self.closed = True
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop, as what follows."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        if self._between_chunks and self.take_chunks is not None:
            data = self.take_chunks(data)
        if data:
            self._read(data)

    def _read(self, data: bytes) -> None:
        is_first = not self._heard
        if is_first:
            self._heard = True
            known = self._known.find(data) if self._listener is not None else None
            if known is not None:
                self._answer, body = known
                self._body.append(body)
                self._keep_alive = True
                self._complete()
                return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._done:
                self._fail(f"no valid HTTP: {error}")
                return
            self._keep_alive = False  # more than was asked for
        if not self._answer.status and self._is_endless(len(data)):
            self._fail("its headers are too large")
            return
        # After a chunk may come the beginning of the next one's size, but no line end.
        self._between_chunks = self._had_chunk and data.endswith(b"\r\n")
        if self._body and not self._answer.is_json:
            self._pass_on()
        if self._done:
            if is_first and self._answer.is_json and self._keep_alive:
                self._known.add(data, self._answer)
            self._complete()
        elif self._answer.is_json:
            self._hold(len(data))

    def eof_received(self) -> None:
        """The engine sends no more: an answer without a length is complete now."""
        if self._until_close and self._listener is not None:
            self._complete()

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed, from either side."""
        self.closed = True
        listener = self._listener
        if listener is not None and self.reused and not self._heard:
            self._listener = None
            listener.stale()
        else:
            self._fail(str(error) if error else "it closed the connection")

    def on_message_begin(self) -> None:
        """Called by llhttp, as what follows."""
        if self._listener is None or self._done:
            raise ValueError("an answer that nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: D102
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > _MAX_HEAD_BYTES:
            raise ValueError("its headers are too large")
        self._head.append((name.lower(), value))

    def on_headers_complete(self) -> None:  # noqa: D102
        parser, answer = self._parser, self._answer
        status = parser.get_status_code()
        self._informational = status < 200
        if self._informational:
            self._head = []
            return
        answer.status, answer.headers = status, self._head
        self._head = []  # trailers go nowhere
        self._keep_alive = parser.should_keep_alive()
        framed = False
        for name, value in answer.headers:
            if name == b"content-type":
                answer.content_type = value
                answer.is_json = value.startswith(b"application/json")
            elif name in {b"content-length", b"transfer-encoding"}:
                framed = True
        self._until_close = not framed

    def on_body(self, data: bytes) -> None:  # noqa: D102
        self._body.append(data)

    def on_chunk_header(self) -> None:  # noqa: D102
        self._had_chunk = False

    def on_chunk_complete(self) -> None:  # noqa: D102
        self._had_chunk = True

    def on_message_complete(self) -> None:  # noqa: D102
        self._done = not self._informational

    def _pass_on(self) -> None:
        listener, parts = self._listener, self._body
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if listener is None:
            return
        if not self._begun:
            self._begun = True
            listener.began(self._answer)
            listener = self._listener  # unless it has hung up
        if listener is not None:
            listener.received(data)

    def _is_endless(self, num_bytes: int) -> bool:
        """More of a head has come, and llhttp keeps what is not whole."""
        self._head_bytes += num_bytes
        return self._head_bytes > _MAX_HEAD_BYTES

    def _hold(self, num_bytes: int) -> None:
        """More of an answer has come that is held until it is whole."""
        self._held_bytes += num_bytes
        if self._held_bytes > self._max_answer_bytes:
            self._fail(f"its answer is larger than {self._max_answer_bytes} bytes")

    def _complete(self) -> None:
        answer = self._answer
        if not self._begun and not answer.is_json and self._listener is not None:
            self._listener.began(answer)  # which may hang up
        listener, self._listener = self._listener, None
        self.take_chunks = None
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._done = self._until_close = False
        if self.closed:
            return
        if self._keep_alive and not self._transport.get_write_buffer_size():
            self.resume()
            self._on_free(self)
        else:
            self.closed = True
            self._transport.close()
        if listener is None:
            return
        try:
            if answer.is_json:
                listener.answered(answer, body)
            else:
                listener.ended()
        except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
            _log.exception("an answer of the engine at %s could not be handed on", self._name)
            listener.broke(EngineBroke("internal error; the gateway's log has more"))

    def _fail(self, reason: str) -> None:
        self.closed = True
        listener, self._listener = self._listener, None
        self._transport.abort()
        if listener is not None:
            listener.broke(EngineBroke(f"the engine at {self._name} broke off: {reason}"))
