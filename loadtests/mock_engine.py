"""An engine without a model, as lean as Python gets: canned answers, and streams of one chunk a tick.

    python -m loadtests.mock_engine --port 18301

`{"stream": true}` in a request gives `--chunks` events, one every `--tick-s` for all streams at once,
as continuous batching does; anything else is answered at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import httptools
import uvloop

_USAGE = {"prompt_tokens": 117, "completion_tokens": 128, "total_tokens": 245}
_COMMON = {"id": "chatcmpl-5b1f5f0c2e4b4b64", "created": 1700000000, "model": "bench"}


def _body() -> bytes:
    text = "The bora falls from the plateau to the sea and clears the sky within an hour. " * 6
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text,
        "tool_calls": [],
        "reasoning": None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    answer = {**_COMMON, "object": "chat.completion", "choices": [choice], "usage": _USAGE}
    return json.dumps(answer).encode()


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    value = {**_COMMON, "object": "chat.completion.chunk", "choices": choices, **more}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_BODY = _body()
_HEAD = b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
_WHOLE = _HEAD + b"content-length: %d\r\ncontent-type: application/json\r\n\r\n%b" % (
    len(_BODY),
    _BODY,
)
_STREAM_HEAD = (
    _HEAD + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_CHUNK = _chunked(
    _event([{"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None}])
)
_LAST = (
    _chunked(_event([{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]))
    + _chunked(_event([], usage=_USAGE))
    + _chunked(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)
_MODELS = json.dumps({"object": "list", "data": [{"id": "bench", "object": "model"}]}).encode()
_GET = _HEAD + b"content-length: %d\r\ncontent-type: application/json\r\n\r\n%b" % (
    len(_MODELS),
    _MODELS,
)


class Ticker:
    """Gives every open stream its next chunk."""

    def __init__(self, num_chunks: int, tick_s: float) -> None:
        self.left: dict[MockEngine, int] = {}
        self._num_chunks = num_chunks
        self._tick_s = tick_s
        self._running = False

    def add(self, stream: MockEngine) -> None:
        """`stream` begins."""
        self.left[stream] = self._num_chunks
        if not self._running:
            self._running = True
            asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        for stream, left in list(self.left.items()):
            if left == 1:
                del self.left[stream]
                stream.transport.write(_LAST)
            else:
                self.left[stream] = left - 1
                stream.transport.write(_CHUNK)
        self._running = bool(self.left)
        if self._running:
            asyncio.get_running_loop().call_later(self._tick_s, self._tick)


class MockEngine(asyncio.Protocol):
    """One connection."""

    def __init__(self, ticker: Ticker) -> None:
        self._ticker = ticker
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop, as what follows."""
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._parser.feed_data(data)

    def connection_lost(self, _error: Exception | None) -> None:  # noqa: D102
        self._ticker.left.pop(self, None)

    def on_body(self, body: bytes) -> None:  # noqa: D102
        self._body += body

    def on_message_complete(self) -> None:  # noqa: D102
        body, self._body = self._body, b""
        if self._parser.get_method() == b"GET":
            self.transport.write(_GET)
        elif b'"stream": true' in body or b'"stream":true' in body:
            self.transport.write(_STREAM_HEAD + _CHUNK)
            self._ticker.add(self)
        else:
            self.transport.write(_WHOLE)


async def _serve(port: int, num_chunks: int, tick_s: float) -> None:
    ticker = Ticker(num_chunks - 1, tick_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: MockEngine(ticker), "127.0.0.1", port, backlog=4096, reuse_port=True
    )
    await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=128)
    parser.add_argument("--tick-s", type=float, default=0.005)
    options = parser.parse_args()
    uvloop.run(_serve(options.port, options.chunks, options.tick_s))


if __name__ == "__main__":
    main()
