"""What steers runs before engines, where that is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.priority import STEERING_NICENESS, outrank_engines

_NOBODY = 65534
# Tells when its second thread runs; the process that it starts later tells its own niceness.
_PROGRAM = """
import os, subprocess, sys, threading
at_work = threading.Event()
threading.Thread(target=lambda: (at_work.set(), threading.Event().wait()), daemon=True).start()
at_work.wait()
print("ready", flush=True)
sys.stdin.readline()
child = [sys.executable, "-c", "import os; print(os.nice(0))"]
print(subprocess.run(child, capture_output=True, text=True).stdout.strip(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_all_threads_and_children_come_before_engines(process: subprocess.Popen[str]) -> None:
    if os.geteuid() != 0:
        assert not outrank_engines(process.pid)
        return
    assert outrank_engines(process.pid)
    threads = [int(each.name) for each in Path(f"/proc/{process.pid}/task").iterdir()]
    assert len(threads) == 2
    assert {os.getpriority(os.PRIO_PROCESS, each) for each in threads} == {STEERING_NICENESS}
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{STEERING_NICENESS}\n"


@pytest.mark.parametrize("niceness", [0, 3])
def test_workers_of_a_node_that_is_ahead_come_back_to_where_its_start_was(niceness: int) -> None:
    program = "import os; from cluster.priority import ahead_of_workers\n"
    program += "print(ahead_of_workers()['RAY_worker_niceness'], os.nice(0))"
    result = subprocess.run(
        ["nice", "-n", str(niceness), sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    was = os.nice(0) + niceness
    ahead, stays = (was - STEERING_NICENESS, STEERING_NICENESS), (0, was)
    assert tuple(map(int, result.stdout.split())) == (ahead if os.geteuid() == 0 else stays)


def test_who_is_not_allowed_to_goes_on() -> None:
    program = "import os; from cluster.priority import outrank_engines\n"
    if os.geteuid() == 0:
        program += f"os.setuid({_NOBODY})\n"
    program += "print(outrank_engines(), os.nice(0))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"False {os.nice(0)}\n"
