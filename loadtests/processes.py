"""Processes of a benchmark: started, waited for, their CPU time read, and ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

START_TIMEOUT_S = 90.0


class CannotRun(Exception):
    """A contender that cannot be installed or started here; the message says why."""


@contextmanager
def mock_engine(folder: Path) -> Iterator[int]:
    """`loadtests.mock_engine`, with its log in `folder`; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "loadtests.mock_engine", "--port", str(port)]
    with listening(command, port, folder / "engine.log"):
        yield port


@contextmanager
def listening(command: Sequence[str], port: int, log: Path) -> Iterator[psutil.Process]:
    """A process that listens on `port`, until the end of the block.

    Raises:
        CannotRun: it could not be started, or does not listen.
    """
    with started(command, log) as process:
        _await_port(process, port, log)
        yield psutil.Process(process.pid)


@contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to `log`; at the end it and its children are ended.

    Raises:
        CannotRun: there is no such program.
    """
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


def cpu_s(process: psutil.Process) -> float:
    """User and system time of the process and all that it started, seconds."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    return total


def free_port() -> int:
    """A port on the loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def last_line(log: Path) -> str:
    """What the process said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-200:] if lines else "(nothing)"


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CannotRun(f"ended with {process.returncode}: {last_line(log)}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise CannotRun(f"did not listen within {START_TIMEOUT_S:g} s: {last_line(log)}")
