"""One tenant floods a model and another still gets its turn: `make bench-fairness`.

    python -m loadtests.bench_fairness [--seconds 12] [--only open-loop]

Tenant B asks at its own rate, alone and then beside tenant A at 50 times that, through bora's
gateway with API keys, before simulated engines with few places. Compared is how long B's requests
waited in the gateway (`queued_s` of its access log). B's p95 may be at most 1.5 times what it was
alone, or `floor`: no request is interrupted, so where every place is taken even the first in line
waits until one is free, with p95 = 3 x (time of a request / places) if places become free at random.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp

from loadtests.drill_processes import Process, free_ports, gateway
from loadtests.processes import CannotRun
from loadtests.stream_check import percentile

_MAX_RATIO = 1.5
_NOISE_S = 0.005  # of two processes on a busy machine
_NUM_ENGINES = 2
_PLACES_EACH = 8
_TPOT_MS = 5.0
_FLOOD = 50
_FLOOD_WARM_UP_S = 3.0
_SETTLED_S = 1.0
_HEADER = (
    "| load | B alone | B beside A | failed | alone p50 | p95 | beside p50 | p95 | ratio of p95 "
    "| floor | A's p95 | A served | fair |"
)
_LEGEND = (
    f"Fair: B loses no request, and its p95 is at most {_MAX_RATIO} times the one alone, or at most "
    "the floor, below which the ratio says nothing."
)


@dataclass(frozen=True, slots=True)
class Load:
    """How one tenant asks.

    `open`: `size` requests a second, at random; `closed`: `size` clients that ask again as soon as
    they are answered; `bursts`: `size` requests at once, every second.
    """

    kind: Literal["open", "closed", "bursts"]
    size: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What both tenants ask, and how; B first."""

    name: str
    quiet: Load
    flood: Load
    quiet_tokens: int = 20
    flood_tokens: int = 20

    @property
    def floor_s(self) -> float:
        """The p95 wait of who is always next, while A's requests hold all places."""
        service_s = self.flood_tokens * _TPOT_MS / 1000
        return 3 * service_s / (_NUM_ENGINES * _PLACES_EACH) + _NOISE_S


SHAPES = (
    Shape("open-loop", Load("open", 8), Load("open", 8 * _FLOOD)),
    Shape("closed-loop", Load("closed", 2), Load("closed", 2 * _FLOOD)),
    Shape("bursts", Load("bursts", 6), Load("open", 6 * _FLOOD)),
    Shape("flood-of-long-answers", Load("open", 4), Load("closed", 200), flood_tokens=200),
)


@dataclass(frozen=True, slots=True)
class Waits:
    """How long requests of one tenant waited in one phase, seconds."""

    count: int
    failed: int
    p50_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """B alone and beside A, and what A got meanwhile."""

    shape: Shape
    alone: Waits
    beside: Waits
    flood: Waits

    @property
    def ratio(self) -> float:
        """Of B's p95 waits. Infinite when it did not wait at all alone."""
        if self.alone.p95_s:
            return self.beside.p95_s / self.alone.p95_s
        return math.inf if self.beside.p95_s else 1.0

    @property
    def is_fair(self) -> bool:
        """B was served, and waited no more than 1.5 times as long, or no longer than it must.

        A flood that did not have to wait itself was none, and shows nothing.
        """
        if not self.alone.count or not self.beside.count or self.beside.failed:
            return False
        if self.flood.p95_s <= self.shape.floor_s:
            return False
        return self.ratio <= _MAX_RATIO or self.beside.p95_s <= self.shape.floor_s

    def line(self) -> str:
        """A line of the table."""
        times_ms = [
            f"{value * 1000:.1f}"
            for waits in (self.alone, self.beside)
            for value in (waits.p50_s, waits.p95_s)
        ]
        values = [
            *(self.shape.name, self.alone.count, self.beside.count, self.beside.failed, *times_ms),
            *(f"{self.ratio:.2f}", f"{self.shape.floor_s * 1000:.1f}"),
            *(f"{self.flood.p95_s * 1000:.0f}", self.flood.count - self.flood.failed),
            "yes" if self.is_fair else "NO",
        ]
        return f"| {' | '.join(map(str, values))} |"


def waits(log: str, prefix: str) -> Waits:
    """From the access log: the requests whose id begins with `prefix`."""
    queued_s, failed = [], 0
    for line in log.splitlines():
        if not line.startswith("{") or f'"request_id": "{prefix}' not in line:
            continue
        record: dict[str, Any] = json.loads(line)
        queued_s.append(float(record["queued_s"]))
        failed += record["status"] != 200
    return Waits(len(queued_s), failed, percentile(queued_s, 0.5), percentile(queued_s, 0.95))


class Tenant:
    """Asks with its own key. `async with` the session it gets."""

    def __init__(self, session: aiohttp.ClientSession, key: str, phase: str, tokens: int) -> None:
        self._session = session
        self._phase = phase
        self._headers = {"authorization": f"Bearer {key}"}
        self._body = {
            "model": "chat",
            "messages": [{"role": "user", "content": f"{phase}: what does the wind do?"}],
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        self._number = 0

    async def ask_for(self, load: Load, seconds: float) -> None:
        """Ask as `load` says until the time is over, and wait for the answers."""
        until_s = time.monotonic() + seconds
        if load.kind == "closed":
            await asyncio.gather(*(self._again(until_s) for _ in range(int(load.size))))
            return
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < until_s:
                at_once = int(load.size) if load.kind == "bursts" else 1
                for _ in range(at_once):
                    group.create_task(self._ask())
                rate = load.size if load.kind == "open" else 1.0
                pause_s = random.expovariate(rate) if load.kind == "open" else 1.0
                await asyncio.sleep(pause_s)

    async def _again(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            if await self._ask() != 200:
                await asyncio.sleep(0.05)

    async def _ask(self) -> int:
        self._number += 1
        headers = {**self._headers, "x-request-id": f"{self._phase}-{self._number}"}
        try:
            async with self._session.post(
                "/v1/chat/completions", json=self._body, headers=headers
            ) as response:
                await response.read()
                return response.status
        except aiohttp.ClientError:
            return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all shapes and print the table. Returns the exit status."""
    options = _parser().parse_args(arguments)
    known = {shape.name: shape for shape in SHAPES}
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            shapes = [known[name] for name in names]
            results = asyncio.run(_measure(shapes, options.seconds, Path(folder)))
    except CannotRun as error:
        _say(f"error: {error}")
        return 2
    _print_table(results)
    return 0 if all(result.is_fair for result in results) else 1


async def _measure(shapes: Sequence[Shape], seconds: float, folder: Path) -> list[Result]:
    keys_file = folder / "keys.yaml"
    keys = {name: _key(name, keys_file) for name in ("quiet", "flood")}
    results = []
    for shape in shapes:
        _say(f"{shape.name} ...")
        async with AsyncExitStack() as stack:
            engines = [_engine(port, folder) for port in free_ports(_NUM_ENGINES)]
            entrance = gateway(
                folder,
                {engine.port: _PLACES_EACH for engine in engines},
                *("--keys", str(keys_file)),
            )
            for process in (*engines, entrance):
                stack.callback(process.kill)
                await process.start()
            result = await _play(shape, entrance, keys, seconds)
        _say(result.line())
        results.append(result)
    return results


async def _play(shape: Shape, entrance: Process, keys: dict[str, str], seconds: float) -> Result:
    phase = {name: f"{shape.name}.{name}" for name in ("alone", "beside", "flood")}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(entrance.url, connector=connector, timeout=timeout) as session:
        alone = Tenant(session, keys["quiet"], phase["alone"], shape.quiet_tokens)
        await alone.ask_for(shape.quiet, seconds)
        flood = Tenant(session, keys["flood"], phase["flood"], shape.flood_tokens)
        beside = Tenant(session, keys["quiet"], phase["beside"], shape.quiet_tokens)

        async def later() -> None:
            await asyncio.sleep(_FLOOD_WARM_UP_S)
            await beside.ask_for(shape.quiet, seconds)

        await asyncio.gather(
            flood.ask_for(shape.flood, seconds + _FLOOD_WARM_UP_S + _SETTLED_S), later()
        )
    await asyncio.sleep(_SETTLED_S)
    log = entrance.log.read_text(encoding="utf-8", errors="replace")
    return Result(shape, *(waits(log, f"{name}-") for name in phase.values()))


def _key(name: str, keys_file: Path) -> str:
    command = [sys.executable, "-m", "cluster", "keys", "create", name, "--file", str(keys_file)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotRun(f"no API key for {name}: {done.stderr.strip()[-300:]}")
    key: str = json.loads(done.stdout)["key"]
    return key


def _engine(port: int, folder: Path) -> Process:
    command = [sys.executable, "-m", "cluster.engines.sim_server", "--model", "chat"]
    command += ["--port", str(port), "--max-num-seqs", "64"]
    command += ["--tpot-ms", str(_TPOT_MS), "--tpot-ms-at-max", str(_TPOT_MS)]
    return Process(command, port, folder / f"engine-{port}.log")


def _print_table(results: Sequence[Result]) -> None:
    places = _NUM_ENGINES * _PLACES_EACH
    lines = [
        f"Time in the gateway's queue, ms. A asks {_FLOOD} times as much as B; {places} places.",
        _HEADER,
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        *(result.line() for result in results),
        _LEGEND,
    ]
    print("\n".join(lines))  # noqa: T201 - this is its output


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each phase")
    parser.add_argument("--only", help=f"of {', '.join(shape.name for shape in SHAPES)}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
