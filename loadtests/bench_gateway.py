"""What a request and a streamed chunk cost, in bora and in its peers: `make bench-gateway`.

    python -m loadtests.bench_gateway [--only bora,floor] [--seconds 3] [--rounds 3]

All stand before one mock engine, one after another, round by round. CPU time is that of the
gateway's process tree, so that the noise of other processes does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from loadtests.bench_peers import Contender, contenders, python_of
from loadtests.processes import (
    START_TIMEOUT_S,
    CannotRun,
    cpu_s,
    free_port,
    last_line,
    listening,
    mock_engine,
    say,
)

_CONNECTIONS = 64
_STREAMS = 32


@dataclass
class Figures:
    """What was measured of one contender, one entry a round."""

    us_per_request: list[float] = field(default_factory=list)
    us_per_unique: list[float] = field(default_factory=list)
    us_per_chunk: list[float] = field(default_factory=list)
    added_p50_us: list[float] = field(default_factory=list)
    requests_per_s: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    options = _parser().parse_args(arguments)
    chosen = _chosen(options.only)
    cache = Path(options.cache).expanduser()
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder, mock_engine(Path(folder)) as engine_port:
        ready: dict[str, tuple[Contender, Path]] = {}
        for contender in chosen:
            try:
                ready[contender.name] = contender, python_of(contender, cache)
            except CannotRun as error:
                say(f"{contender.name}: left out, {error}")
        for number in range(options.rounds):
            for name, (contender, python) in list(ready.items()):
                say(f"round {number + 1}/{options.rounds}: {name}")
                try:
                    with _started(contender, python, engine_port, Path(folder)) as (process, port):
                        _measure(
                            figures.setdefault(name, Figures()),
                            process,
                            port,
                            engine_port,
                            options.seconds,
                        )
                except CannotRun as error:
                    say(f"{name}: left out, {error}")
                    del ready[name]
    _print_table(figures)
    return 0


def _measure(
    figures: Figures, process: psutil.Process, port: int, engine_port: int, seconds: float
) -> None:
    _load(port, _CONNECTIONS, min(seconds, 1.0))  # warm up
    before = cpu_s(process)
    seen = _load(port, _CONNECTIONS, seconds)
    figures.us_per_request.append((cpu_s(process) - before) / seen["requests"] * 1e6)
    figures.requests_per_s.append(seen["requests"] / seconds)
    before = cpu_s(process)
    seen = _load(port, _CONNECTIONS, seconds, "--unique-heads")
    figures.us_per_unique.append((cpu_s(process) - before) / seen["requests"] * 1e6)
    before = cpu_s(process)
    seen = _load(port, _STREAMS, seconds, "--stream")
    figures.us_per_chunk.append((cpu_s(process) - before) / seen["chunks"] * 1e6)
    through, direct = _load(port, 1, 1.0), _load(engine_port, 1, 1.0)
    figures.added_p50_us.append((through["p50_s"] - direct["p50_s"]) * 1e6)


def _load(port: int, connections: int, seconds: float, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadtests.load_client", "--port", str(port), *more]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise CannotRun(f"the load generator failed: {done.stderr.strip()[-300:]}")
    seen: dict[str, Any] = json.loads(done.stdout)
    if seen["failures"] or not seen["requests"]:
        raise CannotRun(f"{seen['failures']} of {seen['requests']} requests failed")
    return seen


@contextmanager
def _started(
    contender: Contender, python: Path, engine_port: int, folder: Path
) -> Iterator[tuple[psutil.Process, int]]:
    port = free_port()
    log = folder / f"{contender.name}.log"
    command = contender.command(python, port, engine_port, folder)
    with listening(command, port, log) as process:
        _await_answer(port, log)
        yield process, port


def _await_answer(port: int, log: Path) -> None:
    """Routers listen before they know that their worker is healthy."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            _load(port, 1, 0.0)
        except CannotRun as error:
            if time.monotonic() > deadline:
                raise CannotRun(f"{error}; its log: {last_line(log)}") from error
            time.sleep(0.3)
        else:
            return


def _print_table(figures: dict[str, Figures]) -> None:
    def middle(values: list[float]) -> float:
        return statistics.median(values) if values else float("nan")

    ours = figures.get("bora", Figures())
    lines = [
        f"CPU of the process tree: {_CONNECTIONS} connections; {_STREAMS} streams; medians",
        "| gateway | us/request | to bora | unique ids | us/chunk | to bora | added p50 us | req/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in figures.items():
        request, chunk = middle(one.us_per_request), middle(one.us_per_chunk)
        lines.append(
            f"| {name} | {request:.1f} | {request / middle(ours.us_per_request):.2f}"
            f" | {middle(one.us_per_unique):.1f} | {chunk:.2f} | {chunk / middle(ours.us_per_chunk):.2f}"
            f" | {middle(one.added_p50_us):.0f} | {middle(one.requests_per_s):.0f} |"
        )
    print("\n".join(lines))  # noqa: T201 - this is its output


def _chosen(only: str | None) -> list[Contender]:
    known = contenders()
    names = only.split(",") if only else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[name] for name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="names, with commas between")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cache", default="~/.cache/bora/bench-gateway", help="peers' environments"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
