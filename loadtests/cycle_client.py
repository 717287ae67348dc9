"""Clients that come and go in every way: before, during and after the answer; engines go, too.

    python -m loadtests.cycle_client --port 8000 --cycles 12000

Prints one line of JSON: how many cycles of each kind ended how.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass, field

import uvloop

from loadtests.stream_client import request

_ADDRESSES = tuple(f"127.0.0.{number}" for number in range(2, 10))
_PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to come and go. `sends`: the share of the request; `leaves_after`: until bytes."""

    text: str
    sends: float = 1.0
    reads: bytes | None = b"0\r\n\r\n"  # hang up when this has come; None: without reading
    stream: bool = True
    resets: bool = False


KINDS = {
    "connects and leaves": Kind("", sends=0.0, reads=None),
    "leaves within the head": Kind("short", sends=0.03, reads=None),
    "leaves within the body": Kind("short", sends=0.6, reads=None, resets=True),
    "leaves before the answer": Kind("late", reads=None),
    "leaves at the first event": Kind("endless", reads=b" t"),
    "resets at the first event": Kind("endless", reads=b" t", resets=True),
    "leaves after the stream": Kind("short"),
    "leaves after the answer": Kind("whole", reads=b"completion_tokens", stream=False),
    "engine leaves in the stream": Kind("engine-leaves"),
    "engine leaves before it": Kind("engine-refuses short"),
}


@dataclass(slots=True)
class Tally:
    """How cycles ended, by kind."""

    ended: Counter[str] = field(default_factory=Counter)
    hung: Counter[str] = field(default_factory=Counter)


class Visitor(asyncio.Protocol):
    """One connection from coming to going."""

    def __init__(self, kind: Kind, data: bytes, gone: asyncio.Future[None]) -> None:
        self._kind = kind
        self._data = data[: int(len(data) * kind.sends)]
        self._gone = gone
        self._come = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop, as what follows."""
        self._transport = transport  # type: ignore[assignment]
        if self._data:
            self._transport.write(self._data)
        if self._kind.reads is None:
            asyncio.get_running_loop().call_later(0.01, self.leave)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._come += data
        if self._kind.reads is not None and self._kind.reads in self._come:
            self.leave()

    def connection_lost(self, _error: Exception | None) -> None:  # noqa: D102
        if not self._gone.done():
            self._gone.set_result(None)

    def leave(self) -> None:
        """Hang up, in the kind's way."""
        if self._kind.resets:
            self._transport.abort()
        else:
            self._transport.close()


async def _cycle(port: int, number: int, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    name = list(KINDS)[number % len(KINDS)]
    kind = KINDS[name]
    gone = loop.create_future()
    data = request(port, kind.text, stream=kind.stream)
    address = _ADDRESSES[number // len(KINDS) % len(_ADDRESSES)]
    _, visitor = await loop.create_connection(
        lambda: Visitor(kind, data, gone), "127.0.0.1", port, local_addr=(address, 0)
    )
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await gone
        tally.ended[name] += 1
    except TimeoutError:
        tally.hung[name] += 1
        visitor.leave()


async def _drive(port: int, cycles: int, concurrency: int) -> Tally:
    tally, waiting = Tally(), iter(range(cycles))

    async def work() -> None:
        for number in waiting:
            await _cycle(port, number, tally)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return tally


def main() -> int:
    """Come and go, then tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cycles", type=int, required=True)
    parser.add_argument("--concurrency", type=int, default=200)
    options = parser.parse_args()
    tally = uvloop.run(_drive(options.port, options.cycles, options.concurrency))
    print(json.dumps({"ended": tally.ended, "hung": tally.hung}))  # noqa: T201 - its output
    return 0


if __name__ == "__main__":
    sys.exit(main())
