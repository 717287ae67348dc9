"""Starting and stopping a node by the name of its cluster, with processes that stand for Ray's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.priority import NORMAL_PRIORITY, VARIABLE
from cluster.ray_node import CLUSTER_VARIABLE, _digest, environment_of_ray, stop

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = (
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
)
PARENT = f"import subprocess; subprocess.run({SLEEP}, env={{}})"


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BORA_STATE", str(tmp_path))


@pytest.fixture
def name(tmp_path: Path) -> str:
    return f"test-{os.getpid()}-{time.time_ns()}"


def running(*command: str, cluster: str = "") -> subprocess.Popen[str]:
    env = {**os.environ, CLUSTER_VARIABLE: cluster} if cluster else None
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> bool:
    if process.stdout is not None:
        process.stdout.close()
    return process.wait(60) != 0


def test_processes_of_the_cluster_end_and_others_go_on(name: str):
    mine, other = running(*SLEEP, cluster=name), running(*SLEEP, cluster=name + "-other")

    stop(name, drain_s=0)

    assert ended(mine)
    assert other.poll() is None
    stop(name + "-other", drain_s=0)
    assert ended(other)


def test_a_process_that_ignores_sigterm_ends_too(name: str):
    stubborn = running(sys.executable, "-c", STUBBORN, cluster=name)
    assert stubborn.stdout is not None
    assert stubborn.stdout.readline() == "1\n"

    stop(name, drain_s=0)

    assert ended(stubborn)


def test_a_descendant_without_the_name_ends_too(name: str):
    parent = running(sys.executable, "-c", PARENT, cluster=name)
    while not (children := psutil.Process(parent.pid).children()):
        time.sleep(0.02)

    stop(name, drain_s=0)

    assert ended(parent)
    assert not children[0].is_running() or children[0].status() == psutil.STATUS_ZOMBIE


def test_stopping_what_does_not_run_is_no_error(name: str, capsys: pytest.CaptureFixture[str]):
    stop(name, drain_s=5)

    assert "0 processes" in capsys.readouterr().out


def test_a_node_is_the_same_while_command_and_identity_are(name: str):
    command = ["ray", "start", "--address=10.0.0.1:6379"]
    node = {"RAY_CLOUD_INSTANCE_ID": "10.0.0.2@1", "HOME": "/root"}

    same = _digest(command, {**node, "HOME": "/elsewhere"})

    assert _digest(command, node) == same
    assert _digest(command, {**node, "RAY_CLOUD_INSTANCE_ID": "10.0.0.2@2"}) != same
    assert _digest([*command, "--block"], node) != same


def test_ray_starts_its_workers_at_normal_priority_unless_the_operator_chose_another(name: str):
    plain = environment_of_ray(name, {"HOME": "/root"})

    assert plain == {**NORMAL_PRIORITY, **plain}
    assert (plain["HOME"], plain[CLUSTER_VARIABLE]) == ("/root", name)
    assert environment_of_ray(name, {VARIABLE: "5"})[VARIABLE] == "5"
