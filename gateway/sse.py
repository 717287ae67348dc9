"""Server-sent events: whole events only, what is in them, and the one that says it went wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gateway.errors import GatewayError

_LONGEST_TAIL_BYTES = 1024 * 1024


class EventAligner:
    """Cuts a byte stream at event boundaries, so that an error event can follow at any time.

    No byte is changed: all that `feed` returned, and `tail`, are the stream. Engines flush whole
    events, so nearly every chunk passes through as it is.
    """

    def __init__(self) -> None:
        self.tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """The whole events that are there now; what follows the last one is kept."""
        if not self.tail and chunk.endswith(b"\n\n"):
            return chunk
        data = self.tail + chunk
        since = max(0, len(self.tail) - 3)  # in the tail itself no event ends
        end = max(_end_of_last(data, mark, since) for mark in (b"\n\n", b"\r\n\r\n", b"\r\r"))
        if len(data) - end > _LONGEST_TAIL_BYTES:  # no event is that long: not our business
            end = len(data)
        self.tail = data[end:]
        return data[:end]


def event_data(events: bytes, *, with_done: bool = False) -> Iterator[bytes]:
    """The `data` lines of whole events, without comments and, unless asked for, `[DONE]`."""
    for line in events.splitlines():
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if with_done or data != b"[DONE]":
                yield data


def error_event(error: GatewayError, path: str) -> bytes:
    """The event that ends a stream that went wrong, in the form that clients of `path` expect."""
    body: dict[str, Any] = {**error.body()}
    if path == "/v1/messages":  # Anthropic
        body = {"type": "error", **body}
    elif path.startswith("/v1/responses"):
        body = {"type": "error", "code": error.code, "message": error.message, **body}
    name = b"event: error\n" if "type" in body else b""
    return name + b"data: " + json.dumps(body).encode() + b"\n\n"


def _end_of_last(data: bytes, mark: bytes, since: int) -> int:
    at = data.rfind(mark, since)
    return 0 if at < 0 else at + len(mark)
