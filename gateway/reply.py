"""Reply: an engine's answer on its way to a client, for the faces to pull or to have pushed."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Protocol

from gateway.answer import Answer
from gateway.errors import EngineBroke
from gateway.record import Record
from gateway.sse import EventAligner
from gateway.usage import find_usage, has_usage

_NOT_FORWARDED = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer"),
        *(b"transfer-encoding", b"upgrade", b"content-length", b"date", b"server"),
        *(b"set-cookie", b"x-request-id", b"x-bora-variant", b"x-bora-endpoint"),
    )
)
_UNSAFE_IN_HEADER = re.compile(r"[^\x21-\x7e]")


class Client(Protocol):
    """Who gets a reply that is pushed."""

    def write(self, data: bytes) -> None:
        """A part of the body, not empty."""

    def follow(self, source: Answer) -> None:
        """`source` is to be paused while the client does not keep up."""


class Reply:
    """An engine's answer: all of it in `body`, or chunk by chunk through `next` or `pour`."""

    __slots__ = ("_aligner", "_answer", "_client", "_record", "body", "is_event_stream")

    def __init__(self, answer: Answer, record: Record) -> None:
        """Begin to answer. Until now nothing has gone to the client, so that it could be elsewhere.

        Raises:
            EngineBroke: the engine ended a stream before its first byte.
        """
        self._answer = answer
        self._record = record
        self._client: Client | None = None
        self._aligner = EventAligner()
        self.body: bytes | None = None
        self.is_event_stream = answer.content_type.startswith(b"text/event-stream")
        if answer.is_json:
            self.body = answer.read()
            record.usage = find_usage(self.body)
            if record.usage is None and answer.status < 400:
                record.answer_chunks = len(self.body) // 4
        elif self.is_event_stream:
            if answer.is_empty:
                raise EngineBroke(f"the engine at {record.endpoint} ended an empty stream")
            record.ttft_s = record.age_s

    @property
    def status(self) -> int:
        """The engine's HTTP status."""
        return self._answer.status

    @property
    def headers(self) -> dict[str, str]:
        """The headers for the client, names in lower case."""
        lines = self.header_lines.decode("latin-1").split("\r\n")
        return dict(line.split(": ", 1) for line in lines if line)

    @property
    def header_lines(self) -> bytes:
        """The headers for the client as HTTP has them, each with its line end."""
        lines = [
            b"%b: %b\r\n" % header
            for header in self._answer.headers
            if header[0] not in _NOT_FORWARDED
        ]
        record = self._record
        lines.append(_headers_of_ours(record.variant, record.endpoint))
        lines.append(b"x-request-id: %b\r\n" % record.request_id.encode())
        if self.status in {429, 503} and not any(
            k == b"retry-after" for k, _ in self._answer.headers
        ):
            lines.append(b"retry-after: 1\r\n")
        return b"".join(lines)

    async def next(self) -> bytes:
        """The next bytes for the client, whole events if it is an event stream; empty at the end.

        Raises:
            EngineBroke: the engine went away before the end.
        """
        while chunk := await self._answer.next():
            if not self.is_event_stream:
                return chunk
            if events := self._aligner.feed(chunk):
                self._record.answer_chunks += events.count(b"data:")
                if has_usage(events):
                    self._note_usage(events)
                return events
        tail, self._aligner.tail = self._aligner.tail, b""
        return tail

    async def pour(self, client: Client) -> None:
        """Write all to `client` as it comes, as fast as it takes it. Raises as `next`."""
        client.follow(self._answer)
        if not self.is_event_stream:
            await self._answer.pour(client.write)
            return
        self._client = client
        await self._answer.pour(self._relay)
        if tail := self._aligner.tail:
            client.write(tail)

    def _relay(self, chunk: bytes) -> None:
        """One read of a stream: whole events go on, and cost little when they came whole."""
        events = self._aligner.feed(chunk)
        if events and self._client is not None:
            self._record.answer_chunks += events.count(b"data:")
            if has_usage(events):
                self._note_usage(events)
            self._client.write(events)

    def _note_usage(self, data: bytes) -> None:
        self._record.usage = find_usage(data) or self._record.usage


@lru_cache(maxsize=4096)
def _headers_of_ours(variant: str, endpoint: str) -> bytes:
    variant, endpoint = (_UNSAFE_IN_HEADER.sub("?", name) for name in (variant, endpoint))
    return f"x-bora-variant: {variant}\r\nx-bora-endpoint: {endpoint}\r\n".encode()
