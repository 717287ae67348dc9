"""10,000 slow streams through one gateway worker, and 24,000 clients that come and go: leaks?

    python -m loadtests.bench_streams [--streams 10000] [--cycles 24000]

Ends with status 1 if the gateway needs more than its memory, if a stream breaks, or if sockets,
requests in flight or memory have grown between two equal batches of cycles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.drill_processes import Process, free_ports, gateway, metrics_of
from loadtests.processes import CannotRun

_MAX_RSS_BYTES = 2**30
_FILES_OF_ITS_OWN = 64  # listening sockets, logs, the event loop's
_MAX_GROWTH_BYTES = 6 * 2**20  # between equal batches of 12,000: 500 bytes a cycle
_WARM_UP_CYCLES = 40_000  # until tables that are bounded, such as the index of prefixes, are full
_POOL_EMPTY_S = 8.0  # the gateway closes idle connections to engines after 4 to 5 s


@dataclass(frozen=True, slots=True)
class State:
    """What could leak."""

    sockets: int
    in_flight: float
    queued: float
    rss_bytes: int

    def __str__(self) -> str:
        rss = self.rss_bytes / 2**20
        return (
            f"{self.sockets} sockets, {self.in_flight:.0f} in flight, {self.queued:.0f} queued, "
            f"{rss:.1f} MiB"
        )


def leaks(before: State, after: State) -> list[str]:
    """What has grown from one idle moment to another between which nothing should stay."""
    grown = []
    if after.sockets > before.sockets:
        grown.append(f"sockets: {before.sockets} -> {after.sockets}")
    if after.in_flight or after.queued:
        grown.append(f"{after.in_flight:.0f} in flight, {after.queued:.0f} queued")
    growth = after.rss_bytes - before.rss_bytes
    if growth > _MAX_GROWTH_BYTES:
        grown.append(f"memory by {growth / 2**20:.1f} MiB")
    return grown


def streams_that_fit(wanted: int, max_files: int) -> int:
    """Streams that one process can carry: each takes a file for its client and one for its engine."""
    return min(wanted, (max_files - _FILES_OF_ITS_OWN) // 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge."""
    options = _parser().parse_args(arguments)
    misses: list[str] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.streams:
                misses += asyncio.run(_hold(options, Path(folder)))
            if options.cycles:
                misses += asyncio.run(_come_and_go(options.cycles, Path(folder)))
    except CannotRun as error:
        _say(f"error: {error}")
        return 2
    for miss in misses:
        _say(f"MISS: {miss}")
    return 1 if misses else 0


async def _hold(options: argparse.Namespace, folder: Path) -> list[str]:
    """Many streams at once."""
    _, max_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = streams_that_fit(options.streams, max_files)
    if count < options.streams:
        _say(f"{count} streams: the hard limit of open files, {max_files}, holds no more")
    interval = str(options.interval_s)
    async with AsyncExitStack() as stack:
        engine = await _started(stack, _engine(folder, "--interval-s", interval))
        entrance = gateway(folder, {engine.port: 2 * count})
        await _started(stack, entrance)
        idle_bytes = entrance.rss_bytes()
        command = ["--port", str(entrance.port), "--streams", str(count)]
        command += ["--direct-port", str(engine.port), "--direct", str(options.direct)]
        command += ["--seconds", str(options.seconds), "--interval-s", interval]
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtests.stream_client", *command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        stack.callback(_kill, client)
        begun = await _told(client, 120)
        cpu_s, since_s = entrance.cpu_s(), time.monotonic()
        through, direct = await _told(client, options.seconds + 30)
        cpu_share = (entrance.cpu_s() - cpu_s) / (time.monotonic() - since_s)
        full_bytes = entrance.rss_bytes()
        in_flight = (await metrics_of(entrance.url)).get("bora_gateway_in_flight", 0)
        await client.communicate(b"")
        await asyncio.sleep(_POOL_EMPTY_S)
        left = (await metrics_of(entrance.url)).get("bora_gateway_in_flight", 0)
        _say(f"one worker, CPU {cpu_share:.0%}, an event every {options.interval_s:g} s each")
        _print_streams(through, direct, full_bytes, full_bytes - idle_bytes)
        _say(f"in flight at the engine by the gateway's count: {in_flight:.0f}; after: {left:.0f}")
        return _stream_misses(count, begun["begun"][0], through, full_bytes, left)


def _stream_misses(
    count: int, begun: int, through: dict[str, float], full_bytes: int, left: float
) -> list[str]:
    misses = []
    if begun < count:
        misses.append(f"only {begun} of {count} streams began")
    if through["broken"]:
        misses.append(f"{through['broken']} streams broke")
    if full_bytes > _MAX_RSS_BYTES:
        misses.append(f"the gateway took {full_bytes / 2**20:.0f} MiB")
    if left:
        misses.append(f"{left:.0f} requests in flight after all clients left")
    return misses


def _print_streams(
    through: dict[str, float], direct: dict[str, float], full_bytes: int, streams_bytes: int
) -> None:
    per_stream = streams_bytes / max(through["streams"], 1) / 1024
    lines = [
        "| streams | broken | events | RSS MiB | KiB a stream | under way p50, p99 ms | late p99 ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one, memory in (
        ("through bora", through, f"{full_bytes / 2**20:.0f} | {per_stream:.1f}"),
        ("directly at the engine, meanwhile", direct, "- | -"),
    ):
        lines.append(
            f"| {one['streams']:.0f} {name} | {one['broken']:.0f} | {one['events']:.0f} | {memory}"
            f" | {one['under_way_p50_s'] * 1000:.2f}, {one['under_way_p99_s'] * 1000:.2f}"
            f" | {one['late_p99_s'] * 1000:.2f} |"
        )
    added = {
        name: (through[f"{name}_p99_s"] - direct[f"{name}_p99_s"]) * 1000
        for name in ("under_way", "late")
    }
    lines.append(
        f"Added at p99: {added['under_way']:.2f} ms to the way of an event, "
        f"{added['late']:.2f} ms to the time between two."
    )
    print("\n".join(lines), flush=True)  # noqa: T201 - this is its output


async def _come_and_go(cycles: int, folder: Path) -> list[str]:
    """Two equal batches of clients that leave."""
    async with AsyncExitStack() as stack:
        faithful = await _started(stack, _engine(folder, "--interval-s", "0.02"))
        leaving = await _started(stack, _engine(folder, "--interval-s", "0.02", "--leaves"))
        entrance = gateway(folder, {faithful.port: 1000, leaving.port: 1000})
        await _started(stack, entrance)
        states, hung = [], 0
        for batch in (_WARM_UP_CYCLES, cycles // 2, cycles // 2):
            since_s = time.monotonic()
            tally = await _batch(entrance.port, batch)
            hung += sum(tally["hung"].values())
            _say(f"{batch} cycles in {time.monotonic() - since_s:.1f} s: {tally}")
            states.append(await _idle_state(entrance))
        names = ("after the warm-up", f"after {cycles // 2} cycles", f"after {cycles} cycles")
        lines = [f"{name}: {state}" for name, state in zip(names, states, strict=True)]
        print("\n".join(lines), flush=True)  # noqa: T201 - this is its output
        misses = leaks(states[1], states[2])
        if states[2].sockets > states[0].sockets:
            misses.append(f"sockets: {states[0].sockets} -> {states[2].sockets}")
        if hung:
            misses.append(f"{hung} cycles hung")
        return misses


async def _batch(port: int, cycles: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadtests.cycle_client", "--port", str(port)]
    client = await asyncio.create_subprocess_exec(
        *(*command, "--cycles", str(cycles)), stdout=asyncio.subprocess.PIPE
    )
    try:
        told: dict[str, Any] = await _told(client, 600)
        await client.wait()
    finally:
        _kill(client)
    return told


async def _idle_state(entrance: Process) -> State:
    """What the gateway holds when nobody has wanted anything for a while."""
    await asyncio.sleep(_POOL_EMPTY_S)
    metrics = await metrics_of(entrance.url)
    await asyncio.sleep(0.2)  # that connection is gone, too
    return State(
        entrance.num_sockets(),
        metrics.get("bora_gateway_in_flight", 0.0),
        metrics.get("bora_gateway_queued", 0.0),
        entrance.rss_bytes(),
    )


def _engine(folder: Path, *options: str) -> Process:
    [port] = free_ports(1)
    command = [sys.executable, "-m", "loadtests.slow_engine", "--port", str(port), *options]
    return Process(command, port, folder / f"engine-{port}.log", ready_path="/v1/models")


async def _started(stack: AsyncExitStack, process: Process) -> Process:
    stack.callback(process.kill)
    await process.start()
    return process


async def _told(client: asyncio.subprocess.Process, timeout_s: float) -> Any:
    """The client's next line.

    Raises:
        CannotRun: it ended, or says nothing in time.
    """
    if client.stdout is None:
        raise CannotRun("the client has no output")
    try:
        line = await asyncio.wait_for(client.stdout.readline(), timeout_s)
    except TimeoutError:
        raise CannotRun(f"the client said nothing within {timeout_s:g} s") from None
    if not line:
        raise CannotRun("the client ended before it was done")
    return json.loads(line)


def _kill(client: asyncio.subprocess.Process) -> None:
    if client.returncode is None:
        client.kill()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000, help="0: leave that part out")
    parser.add_argument("--direct", type=int, default=200, help="streams past the gateway")
    parser.add_argument("--interval-s", type=float, default=2.0, help="between events of a stream")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring")
    parser.add_argument("--cycles", type=int, default=24_000, help="0: leave that part out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
