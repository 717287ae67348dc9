"""An engine for very many slow streams: one event every `--interval-s` each, with the time it was sent.

    python -m loadtests.slow_engine --port 18401 --interval-s 2

As lean as `mock_engine`. What a request's text asks for decides how it ends: `short` ends after 3
events, `late` has no answer before long, `whole` does not stream; with `--leaves` the engine breaks
off the connection of `engine-leaves` in the middle and of `engine-refuses` before the answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable

import httptools
import uvloop

_SLOT_S = 0.005
_SHORT_EVENTS = 3
_LATE_S = 0.5
_HEAD = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\n"
_STREAM_HEAD = (
    _HEAD + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_COMMON = (
    b'{"id":"chatcmpl-5b1f","object":"chat.completion.chunk","created":1700000000,"model":"chat",'
)
_USAGE = b'"usage":{"prompt_tokens":200,"total_tokens":203,"completion_tokens":3}'


def _chunked(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event) + 8, b"data: " + event + b"\n\n")


_OPENING = _chunked(
    _COMMON + b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
    b'"finish_reason":null}],"prompt_token_ids":[1,2,3],"prompt_text":null}'
)
_LAST = (
    _chunked(
        _COMMON + b'"choices":[{"index":0,"delta":{"content":"."},"logprobs":null,'
        b'"finish_reason":"length","stop_reason":null,"token_ids":[7]}]}'
    )
    + _chunked(_COMMON + b'"choices":[],' + _USAGE + b"}")
    + _chunked(b"[DONE]")
    + b"0\r\n\r\n"
)


def _event(now_ns: int) -> bytes:
    return _chunked(
        _COMMON + b'"choices":[{"index":0,"delta":{"content":" t%d"},"logprobs":null,'
        b'"finish_reason":null,"token_ids":[4711]}]}' % now_ns
    )


def _json(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return b"%bcontent-length: %d\r\ncontent-type: application/json\r\n\r\n%b" % (
        _HEAD,
        len(data),
        data,
    )


_WHOLE = _json(
    {
        "id": "chatcmpl-5b1f",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "chat",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "."}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 200, "total_tokens": 201, "completion_tokens": 1},
    }
)
_GET = _json({"object": "list", "data": [{"id": "chat", "object": "model", "max_model_len": 9999}]})


class Wheel:
    """Gives every stream an event each `interval_s`, spread evenly over that time."""

    def __init__(self, interval_s: float) -> None:
        self._slots: list[set[SlowEngine]] = [
            set() for _ in range(max(int(interval_s / _SLOT_S), 1))
        ]
        self._slot_s = interval_s / len(self._slots)

    def add(self, stream: SlowEngine) -> Callable[[SlowEngine], None]:
        """`stream` begins; returns what ends it."""
        slot = random.choice(self._slots)  # noqa: S311 - to spread the load
        slot.add(stream)
        return slot.discard

    async def turn(self) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            for slot in self._slots:
                due_s += self._slot_s
                await asyncio.sleep(max(due_s - loop.time(), 0))
                for stream in tuple(slot):
                    stream.tick()


class SlowEngine(asyncio.Protocol):
    """One connection."""

    def __init__(self, wheel: Wheel, *, leaves: bool) -> None:
        self._wheel = wheel
        self._leaves = leaves
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._left = 0
        self._breaks = False
        self._stop: Callable[[SlowEngine], None] | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop, as what follows."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._parser.feed_data(data)

    def connection_lost(self, _error: Exception | None) -> None:  # noqa: D102
        self._end()

    def on_body(self, body: bytes) -> None:  # noqa: D102
        self._body += body

    def on_message_complete(self) -> None:  # noqa: D102
        body, self._body = self._body, b""
        if self._parser.get_method() == b"GET":
            self._transport.write(_GET)
        elif b"engine-refuses" in body and self._leaves:
            self._transport.close()
        elif b"whole" in body:
            self._transport.write(_WHOLE)
        else:
            self._left = _SHORT_EVENTS if b"short" in body or b"engine-leaves" in body else -1
            self._breaks = self._leaves and b"engine-leaves" in body
            if b"late" in body:
                asyncio.get_running_loop().call_later(_LATE_S, self._begin)
            else:
                self._begin()

    def tick(self) -> None:
        """The next event."""
        if self._left == 0:
            self._end()
            self._transport.write(_LAST)
        elif self._left == 1 and self._breaks:
            self._end()
            self._transport.abort()
        else:
            self._left -= self._left > 0
            self._transport.write(_event(time.monotonic_ns()))

    def _begin(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(_STREAM_HEAD + _OPENING + _event(time.monotonic_ns()))
            self._stop = self._wheel.add(self)

    def _end(self) -> None:
        if self._stop is not None:
            self._stop(self)
            self._stop = None


async def _serve(port: int, interval_s: float, *, leaves: bool) -> None:
    wheel = Wheel(interval_s)
    loop = asyncio.get_running_loop()
    await loop.create_server(
        lambda: SlowEngine(wheel, leaves=leaves), "127.0.0.1", port, backlog=4096
    )
    await wheel.turn()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--interval-s", type=float, default=2.0)
    parser.add_argument("--leaves", action="store_true", help="break off where the text says so")
    options = parser.parse_args()
    uvloop.run(_serve(options.port, options.interval_s, leaves=options.leaves))


if __name__ == "__main__":
    main()
