"""What bora's gRPC face costs beside a bare grpc.aio pass-through: `make bench-grpc`.

    python -m loadtests.bench_grpc [--only bora,pass-through] [--seconds 3] [--rounds 3]

The pass-through stands before a gRPC server of canned answers, bora before the HTTP mock engine, whose
answers say the same. CPU time is that of the gateway's process tree, so that the noise of other
processes does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from loadtests.bench_peers import contenders
from loadtests.processes import CannotRun, cpu_s, free_port, listening, mock_engine, say

_CALLS = 64
_STREAMS = 32
_BARE = "pass-through"
_NAMES = (_BARE, "bora", "bora-oip")


@dataclass
class Figures:
    """What was measured of one contender, one entry a round."""

    us_per_request: list[float] = field(default_factory=list)
    us_per_message: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    requests_per_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ports:
    """What stands behind the contenders."""

    engine: int
    server: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    options = _parser().parse_args(arguments)
    names = options.only.split(",") if options.only else list(_NAMES)
    unknown = [name for name in names if name not in _NAMES]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(_NAMES)}")
    figures: dict[str, Figures] = {name: Figures() for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with mock_engine(folder) as engine_port, _canned_server(folder) as server_port:
            ports = Ports(engine_port, server_port)
            for number in range(options.rounds):
                for name in names:
                    say(f"round {number + 1}/{options.rounds}: {name}")
                    with _started(name, ports, folder) as (process, port):
                        _measure(figures[name], process, port, options.seconds, _form(name))
    _print_table(figures)
    return 0


def _form(name: str) -> tuple[str, ...]:
    return ("--oip",) if name == "bora-oip" else ()


def _measure(
    figures: Figures, process: psutil.Process, port: int, seconds: float, form: tuple[str, ...]
) -> None:
    _load(port, _CALLS, min(seconds, 1.0), *form)  # warm up
    before = cpu_s(process)
    seen = _load(port, _CALLS, seconds, *form)
    figures.us_per_request.append((cpu_s(process) - before) / seen["requests"] * 1e6)
    figures.requests_per_s.append(seen["requests"] / seconds)
    before = cpu_s(process)
    seen = _load(port, _STREAMS, seconds, "--stream", *form)
    figures.us_per_message.append((cpu_s(process) - before) / seen["messages"] * 1e6)
    figures.p50_us.append(_load(port, 1, min(seconds, 1.0), *form)["p50_s"] * 1e6)


def _load(port: int, calls: int, seconds: float, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadtests.grpc_load_client", "--port", str(port), *more]
    command += ["--calls", str(calls), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise CannotRun(f"the load generator failed: {done.stderr.strip()[-300:]}")
    seen: dict[str, Any] = json.loads(done.stdout)
    if seen["failures"] or not seen["requests"]:
        raise CannotRun(f"{seen['failures']} calls failed: {seen['error']}")
    return seen


@contextmanager
def _canned_server(folder: Path) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "loadtests.plain_grpc", "server", "--port", str(port)]
    with listening(command, port, folder / "server.log"):
        yield port


@contextmanager
def _started(name: str, ports: Ports, folder: Path) -> Iterator[tuple[psutil.Process, int]]:
    port = free_port()
    if name == _BARE:
        command = [sys.executable, "-m", "loadtests.plain_grpc", name, "--port", str(port)]
        command += ["--server-port", str(ports.server)]
    else:
        bora = contenders()["bora"].command
        command = list(bora(Path(sys.executable), free_port(), ports.engine, folder))
        command[command.index("--grpc-port") + 1] = str(port)
    with listening(command, port, folder / f"{name}.log") as process:
        yield process, port


def _print_table(figures: dict[str, Figures]) -> None:
    def middle(values: list[float]) -> float:
        return statistics.median(values) if values else float("nan")

    bare = figures.get(_BARE, Figures())
    lines = [
        f"CPU of the process tree: {_CALLS} calls at once; {_STREAMS} streams; medians; wanted: <=1.5",
        "| gRPC gateway | us/request | times | us/message | times | p50 us alone | req/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in figures.items():
        request, message = middle(one.us_per_request), middle(one.us_per_message)
        lines.append(
            f"| {name} | {request:.0f} | {request / middle(bare.us_per_request):.2f}"
            f" | {message:.1f} | {message / middle(bare.us_per_message):.2f}"
            f" | {middle(one.p50_us):.0f} | {middle(one.requests_per_s):.0f} |"
        )
    print("\n".join(lines))  # noqa: T201 - this is its output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"of {', '.join(_NAMES)}, with commas between")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
