"""A client of very many slow streams, some of them directly at the engine, for comparison.

    python -m loadtests.stream_client --port 8000 --streams 10000 --direct-port 18401 --direct 200

Opens them, waits until all have begun, measures for `--seconds`, and prints one line of JSON: for
both groups how long events were under way and how evenly they came. Then it waits for the end of its
standard input before it hangs up, so that who started it can look at the gateway under load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import uvloop

from loadtests.stream_check import percentile

_STAMP = re.compile(rb" t(\d{10,})")
_ADDRESSES = tuple(f"127.0.0.{number}" for number in range(2, 10))  # 28,000 ports each
_OPENING_AT_ONCE = 100
_BEGUN_TIMEOUT_S = 60.0
_TEXT = "List what could go wrong when a clock on one of three servers runs backwards. " * 10


@dataclass
class Group:
    """What the streams to one address saw; times in seconds."""

    port: int
    wanted: int
    begun: int = 0
    broken: int = 0
    measuring: bool = False
    under_way_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    def report(self, *, expected_gap_s: float) -> dict[str, float]:
        """Percentiles. `late` is how much longer than `expected_gap_s` events are apart."""
        late_s = [max(gap - expected_gap_s, 0.0) for gap in self.gaps_s]
        return {
            "streams": self.begun,
            "broken": self.broken,
            "events": len(self.under_way_s),
            "under_way_p50_s": percentile(self.under_way_s, 0.5),
            "under_way_p99_s": percentile(self.under_way_s, 0.99),
            "late_p50_s": percentile(late_s, 0.5),
            "late_p99_s": percentile(late_s, 0.99),
        }


class SlowStream(asyncio.Protocol):
    """One stream, read until somebody hangs up."""

    def __init__(self, group: Group, request: bytes) -> None:
        self._group = group
        self._request = request
        self._last_ns = 0
        self._over = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop, as what follows."""
        self._transport = transport  # type: ignore[assignment]
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        now_ns, group = time.monotonic_ns(), self._group
        for stamp in _STAMP.findall(data):
            if not self._last_ns:
                group.begun += 1
            elif group.measuring:
                group.under_way_s.append((now_ns - int(stamp)) / 1e9)
                group.gaps_s.append((now_ns - self._last_ns) / 1e9)
            self._last_ns = now_ns

    def connection_lost(self, _error: Exception | None) -> None:  # noqa: D102
        self._group.broken += not self._over

    def leave(self) -> None:
        """Hang up."""
        self._over = True
        self._transport.abort()


def request(port: int, text: str, *, stream: bool = True) -> bytes:
    """A chat request over HTTP/1.1 with `text` in it."""
    message = {"role": "user", "content": f"{text} {_TEXT}"}
    body = {"model": "chat", "messages": [message], "max_tokens": 1000, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\n"
        "User-Agent: AsyncOpenAI/Python 2.0.0\r\nAuthorization: Bearer any\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def _open(group: Group) -> list[SlowStream]:
    loop = asyncio.get_running_loop()
    streams: list[SlowStream] = []
    data = request(group.port, "slowly")
    for start in range(0, group.wanted, _OPENING_AT_ONCE):
        numbers = range(start, min(start + _OPENING_AT_ONCE, group.wanted))
        opened = await asyncio.gather(
            *(
                loop.create_connection(
                    lambda: SlowStream(group, data),
                    "127.0.0.1",
                    group.port,
                    local_addr=(_ADDRESSES[number % len(_ADDRESSES)], 0),
                )
                for number in numbers
            )
        )
        streams += [stream for _, stream in opened]
    return streams


async def _drive(groups: Sequence[Group], seconds: float, interval_s: float) -> None:
    streams = [stream for group in groups for stream in await _open(group)]
    for _ in range(int(_BEGUN_TIMEOUT_S / 0.1)):
        if all(group.begun >= group.wanted for group in groups):
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(interval_s)  # the opening's turmoil is not what is measured
    print(json.dumps({"begun": [group.begun for group in groups]}), flush=True)  # noqa: T201
    for group in groups:
        group.measuring = True
    await asyncio.sleep(seconds)
    for group in groups:
        group.measuring = False
    report = [group.report(expected_gap_s=interval_s) for group in groups]
    print(json.dumps(report), flush=True)  # noqa: T201 - this is its output
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for stream in streams:
        stream.leave()
    await asyncio.sleep(0.2)


def main() -> None:
    """Open, measure, tell, wait, leave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--direct-port", type=int, required=True)
    parser.add_argument("--direct", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--interval-s", type=float, default=2.0)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    groups = [Group(options.port, options.streams), Group(options.direct_port, options.direct)]
    uvloop.run(_drive(groups, options.seconds, options.interval_s))


if __name__ == "__main__":
    main()
