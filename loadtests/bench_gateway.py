"""What a request and a streamed chunk cost, in bora and in its peers: `make bench-gateway`.

    python -m loadtests.bench_gateway [--only bora,floor] [--seconds 3] [--rounds 3]

All stand before one mock engine, one after another, round by round. CPU time is that of the
gateway's process tree, so that the noise of other processes does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
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

from loadtests.bench_peers import CannotRun, Contender, contenders, python_of

_START_TIMEOUT_S = 90.0
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
    with tempfile.TemporaryDirectory() as folder, _engine(Path(folder)) as engine_port:
        ready: dict[str, tuple[Contender, Path]] = {}
        for contender in chosen:
            try:
                ready[contender.name] = contender, python_of(contender, cache)
            except CannotRun as error:
                _say(f"{contender.name}: left out, {error}")
        for number in range(options.rounds):
            for name, (contender, python) in list(ready.items()):
                _say(f"round {number + 1}/{options.rounds}: {name}")
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
                    _say(f"{name}: left out, {error}")
                    del ready[name]
    _print_table(figures)
    return 0


def _measure(
    figures: Figures, process: psutil.Process, port: int, engine_port: int, seconds: float
) -> None:
    _load(port, _CONNECTIONS, min(seconds, 1.0))  # warm up
    before = _cpu_s(process)
    seen = _load(port, _CONNECTIONS, seconds)
    figures.us_per_request.append((_cpu_s(process) - before) / seen["requests"] * 1e6)
    figures.requests_per_s.append(seen["requests"] / seconds)
    before = _cpu_s(process)
    seen = _load(port, _CONNECTIONS, seconds, "--unique-heads")
    figures.us_per_unique.append((_cpu_s(process) - before) / seen["requests"] * 1e6)
    before = _cpu_s(process)
    seen = _load(port, _STREAMS, seconds, "--stream")
    figures.us_per_chunk.append((_cpu_s(process) - before) / seen["chunks"] * 1e6)
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


def _cpu_s(process: psutil.Process) -> float:
    """User and system time of the process and all that it started, seconds."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    return total


@contextmanager
def _engine(folder: Path) -> Iterator[int]:
    port = _free_port()
    command = [sys.executable, "-m", "loadtests.mock_engine", "--port", str(port)]
    with _process(command, folder / "engine.log") as process:
        _await_port(process, port, folder / "engine.log")
        yield port


@contextmanager
def _started(
    contender: Contender, python: Path, engine_port: int, folder: Path
) -> Iterator[tuple[psutil.Process, int]]:
    port = _free_port()
    log = folder / f"{contender.name}.log"
    command = contender.command(python, port, engine_port, folder)
    with _process(command, log) as process:
        _await_port(process, port, log)
        _await_answer(port, log)
        yield psutil.Process(process.pid), port


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    own = Path(command[0]).parent == Path(sys.executable).parent
    environment = dict(os.environ)
    if not own:
        environment.pop("PYTHONPATH", None)
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
    except OSError as error:
        raise CannotRun(f"not started: {error}") from error
    try:
        yield process
    finally:
        family = _family(process.pid)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in family:
            if child.is_running():
                child.kill()


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CannotRun(f"ended with {process.returncode}: {_last_line(log)}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise CannotRun(f"did not listen within {_START_TIMEOUT_S:g} s: {_last_line(log)}")


def _await_answer(port: int, log: Path) -> None:
    """Routers listen before they know that their worker is healthy."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            _load(port, 1, 0.0)
        except CannotRun as error:
            if time.monotonic() > deadline:
                raise CannotRun(f"{error}; its log: {_last_line(log)}") from error
            time.sleep(0.3)
        else:
            return


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-200:] if lines else "(nothing)"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


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
