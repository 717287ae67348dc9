"""A load generator of one process: keep-alive connections that ask again as soon as answered.

    python -m loadtests.load_client --port 8000 --connections 64 --seconds 3

Prints one line of JSON: requests, chunks of streams, failures, and latency percentiles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import httptools
import uvloop

KEY = "any"
_TEXT = "List what could go wrong when a clock on one of three servers runs backwards. " * 5


@dataclass
class Tally:
    """What all connections saw."""

    until: float
    requests: int = 0
    chunks: int = 0
    unique_heads: bool = False
    failures: int = 0
    latencies_s: list[float] = field(default_factory=list)


class Asker(asyncio.Protocol):
    """One connection: asks, reads the answer, asks again until the time is over."""

    def __init__(self, request: bytes, tally: Tally, done: asyncio.Future[None]) -> None:
        self._request = request
        self._tally = tally
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self._asked_at = 0.0
        self._over = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop, as what follows."""
        self._transport = transport  # type: ignore[assignment]
        self._ask()

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._parser.feed_data(data)

    def connection_lost(self, _error: Exception | None) -> None:  # noqa: D102
        if not self._over:
            self._tally.failures += 1
        if not self._done.done():
            self._done.set_result(None)

    def on_body(self, data: bytes) -> None:  # noqa: D102
        self._tally.chunks += data.count(b'"delta"')

    def on_message_complete(self) -> None:  # noqa: D102
        now = time.perf_counter()
        tally = self._tally
        tally.latencies_s.append(now - self._asked_at)
        tally.requests += 1
        if self._parser.get_status_code() != 200:
            tally.failures += 1
        if now < tally.until:
            self._ask()
        else:
            self._over = True
            self._transport.close()

    def _ask(self) -> None:
        self._asked_at = time.perf_counter()
        request = self._request
        if self._tally.unique_heads:
            request = request.replace(
                b"\r\n", b"\r\nX-Request-Id: %d\r\n" % random.getrandbits(60), 1
            )
        self._transport.write(request)


def _request(port: int, *, stream: bool) -> bytes:
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": _TEXT}],
        "max_tokens": 128,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\n"
        "Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
        f"User-Agent: AsyncOpenAI/Python 2.0.0\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def _drive(
    port: int, connections: int, seconds: float, *, stream: bool, unique_heads: bool
) -> Tally:
    loop = asyncio.get_running_loop()
    tally = Tally(time.perf_counter() + seconds, unique_heads=unique_heads)
    request = _request(port, stream=stream)
    ends = []
    for _ in range(connections):
        done = loop.create_future()
        ends.append(done)
        await loop.create_connection(
            lambda done=done: Asker(request, tally, done),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
    await asyncio.gather(*ends)
    return tally


def main() -> None:
    """Ask, then print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--unique-heads", action="store_true", help="an id in each request")
    options = parser.parse_args()
    tally = uvloop.run(
        _drive(
            options.port,
            options.connections,
            options.seconds,
            stream=options.stream,
            unique_heads=options.unique_heads,
        )
    )
    latencies = sorted(tally.latencies_s) or [0.0]
    seen = {
        "requests": tally.requests,
        "chunks": tally.chunks,
        "failures": tally.failures,
        "p50_s": latencies[len(latencies) // 2],
        "p99_s": latencies[len(latencies) * 99 // 100],
    }
    print(json.dumps(seen))  # noqa: T201 - this is its output


if __name__ == "__main__":
    main()
