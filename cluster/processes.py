"""Child processes that cannot outlive their parent, ports, and who is still alive."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from cluster.engines import guard
from cluster.errors import PortInUse
from gateway.ports import free_ports, free_ports_in_a_row

__all__ = [
    "free_ports",
    "free_ports_in_a_row",
    "is_alive",
    "require_free_port",
    "start_guarded",
    "stop_guarded",
    "tail",
]


def start_guarded(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    grace_s: float = 10.0,
    files: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` under the guard: it and all it starts end with this process at the latest.

    Output goes to `log` (appended). `terminate()` or closing `stdin` of the returned process (the
    guard) ends the whole tree; its return code is the command's. The guard, not the command, holds
    the open `files` as long as anything of the tree is left.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    guard_command = [sys.executable, "-I", "-S", guard.__file__]
    guard_command += ["--grace-s", str(grace_s), "--log", str(log), "--", *command]
    with log.open("ab") as errors:
        return subprocess.Popen(
            guard_command,
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent alone
            pass_fds=files,
        )


def stop_guarded(process: subprocess.Popen[bytes], timeout_s: float = 30.0) -> None:
    """End the tree and wait until nothing of it is left.

    Raises:
        subprocess.TimeoutExpired: something still lives after `timeout_s`.
    """
    if process.stdin:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    process.wait(timeout_s)


def require_free_port(host: str, port: int, what: str) -> None:
    """Refuse early what would fail late.

    Raises:
        PortInUse: something listens on `host:port`.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"{what} cannot listen on {host}:{port}: {error.strerror}. "
                f"Stop what uses the port, or choose another one"
            ) from error


def is_alive(pid: int, started_at: float) -> bool:
    """Whether the process `pid` that started at `started_at` (epoch seconds) still runs."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started_at) < 1 and process.status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def tail(path: Path, lines: int) -> str:
    """The last `lines` lines of a text file; empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 400 * lines))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
