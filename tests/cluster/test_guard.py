"""Nothing that was started outlives the one who asked for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.errors import PortInUse
from cluster.processes import free_ports, require_free_port, start_guarded, stop_guarded, tail

FAMILY = "setsid sleep 600 & sleep 600 & (setsid sh -c 'sleep 600 & sleep 600' &) ; wait"


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != "zombie" for process in processes)


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def family_of(pid: int, size: int) -> list[psutil.Process]:
    """The descendants of `pid`, once there are `size` of them."""
    assert eventually(lambda: len(psutil.Process(pid).children(recursive=True)) >= size)
    return psutil.Process(pid).children(recursive=True)


def test_closing_the_guard_ends_the_command_and_what_left_its_session(tmp_path: Path):
    guard = start_guarded(["sh", "-c", FAMILY], log=tmp_path / "log", grace_s=1)
    family = family_of(guard.pid, 6)

    stop_guarded(guard)

    assert gone(family)


def test_a_command_that_ends_takes_its_children_along_and_its_status_is_kept(tmp_path: Path):
    guard = start_guarded(["sh", "-c", "setsid sleep 600 & exit 7"], log=tmp_path / "log")

    assert guard.wait(60) == 7
    guard.stdin.close()


def test_a_command_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path):
    script = "trap '' TERM; while true; do sleep 600; done"
    guard = start_guarded(["sh", "-c", script], log=tmp_path / "log", grace_s=0.2)
    family = family_of(guard.pid, 2)

    stop_guarded(guard)

    assert gone(family)


def test_everything_ends_when_the_parent_is_killed(tmp_path: Path):
    parent_code = (
        "import sys, time, pathlib\n"
        "from cluster.processes import start_guarded\n"
        f"start_guarded(['sh', '-c', {FAMILY!r}], log=pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code])
    family = family_of(parent.pid, 7)

    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()

    assert eventually(lambda: gone(family))


def test_output_is_appended_to_the_log(tmp_path: Path):
    log = tmp_path / "deep" / "log"
    for word in ("first", "second"):
        guard = start_guarded(["echo", word], log=log)
        guard.wait(60)
        guard.stdin.close()

    assert tail(log, 10) == "first\nsecond"
    assert tail(log, 1) == "second"


def test_a_command_that_does_not_exist_says_so_in_the_log(tmp_path: Path):
    guard = start_guarded(["no-such-command"], log=tmp_path / "log")
    guard.stdin.close()

    assert guard.wait(60) != 0
    assert "no-such-command" in tail(tmp_path / "log", 20)


def test_a_port_in_use_is_refused_with_its_number():
    [port] = free_ports(1)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port))
        sock.listen()
        with pytest.raises(PortInUse, match=str(port)):
            require_free_port("127.0.0.1", port, "the gateway")
    require_free_port("127.0.0.1", port, "the gateway")
