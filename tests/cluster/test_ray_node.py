"""Starting and stopping a node by the name of its cluster, with processes that stand for Ray's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.head_store import HeadStore
from cluster.node_record import NodeRecord, read_record, write_record
from cluster.priority import NORMAL_PRIORITY, VARIABLE
from cluster.processes import free_ports
from cluster.ray_node import CLUSTER_VARIABLE, _digest, environment_of_ray, main, stop
from cluster.ray_settings import SERVE_SETTINGS
from tests.debian_packages import install_missing
from tests.system.harness import eventually

ROOT = Path(__file__).resolve().parents[2]
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


RAY = """
import os, subprocess, sys, time
with open({folder!r} + "/starts", "a") as file:
    file.write("start\\n")
here = [sys.executable, "-c", "import time; time.sleep(600)"]
for title in {titles!r}:
    subprocess.Popen([title, *here[1:]], executable=here[0], start_new_session=True,
                     stdout=subprocess.DEVNULL)
time.sleep(1)
"""


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `ray` in which `ray start` starts processes called like Ray's; notes its calls."""
    scripts = tmp_path / "ray" / "scripts"
    scripts.mkdir(parents=True)
    for folder in (scripts, scripts.parent):
        (folder / "__init__.py").touch()
    titles = ["/x/raylet/raylet", "/x/gcs_server"]
    (scripts / "scripts.py").write_text(RAY.format(folder=str(tmp_path), titles=titles))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    return tmp_path / "starts"


def node(action: str, name: str, *command: str) -> subprocess.Popen[str]:
    call = [sys.executable, "-m", "cluster.ray_node", action, "--cluster", name, *command]
    return subprocess.Popen(call, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


START = ("--", "ray", "start", "--stand-in")  # which Ray itself would refuse


def test_of_two_starts_at_once_the_second_finds_the_node(name: str, ray: Path):
    """Else each would end the processes of the other."""
    both = [node("start", name, *START), node("start", name, *START)]

    told = [said(process) for process in both]

    assert ray.read_text() == "start\n"
    assert sum("nothing changed" in text for text in told) == 1
    said(node("stop", name))


def test_a_node_is_known_again_after_the_clock_was_set(name: str, ray: Path, tmp_path: Path):
    """Its processes are told by ticks since the boot, and by the boot."""
    said(node("start", name, *START))
    file = tmp_path / f"cluster-{name}-node.json"
    record = read_record(file)
    assert record is not None
    assert record.runs
    assert len(record.needed) == 2
    write_record(file, record.model_copy(update={"boot": "another"}))

    assert "nothing changed" not in said(node("start", name, *START))
    assert "nothing changed" in said(node("start", name, *START))
    assert ray.read_text() == "start\nstart\n"
    said(node("stop", name))
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"digest": "x", "needed": [[1', '{"needed": 3}'])
def test_a_broken_record_counts_as_none(name: str, tmp_path: Path, text: str):
    file = tmp_path / f"cluster-{name}-node.json"
    file.write_text(text)

    assert read_record(file) is None
    stop(name, drain_s=0)  # which reads it too


def test_what_a_head_that_died_kept_in_redis_is_forgotten_with_its_cluster(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its GCS tells no longer where that is."""
    [port] = free_ports(1)
    file = tmp_path / f"cluster-{name}-node.json"
    store = HeadStore("127.0.0.1", port, "", "", encrypted=False, namespace=name)
    write_record(file, NodeRecord(digest="", boot="", needed=(), session="", store=store))

    assert main(["stop", "--cluster", name]) == 4
    assert f"Redis at 127.0.0.1:{port} could not be told" in capsys.readouterr().err
    assert file.exists()  # for another `ray down`

    with redis_at(port, tmp_path) as redis:
        redis("set", f"RAY{name}@NODE", "1")
        assert main(["stop", "--cluster", name]) == 0
        assert redis("keys", "*").strip() == ""
    assert not file.exists()


@contextlib.contextmanager
def redis_at(port: int, folder: Path) -> Iterator[Callable[..., str]]:
    """A server; what it gives asks it something."""
    install_missing()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]

    def ask(*words: str) -> str:
        asked = ["redis-cli", "-p", str(port), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout

    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as server:
        try:
            eventually(lambda: "PONG" in ask("ping"))
            yield ask
        finally:
            server.terminate()


def test_ray_starts_its_workers_at_normal_priority_unless_the_operator_chose_another(name: str):
    plain = environment_of_ray(name, {"HOME": "/root"})

    assert plain == {**NORMAL_PRIORITY, **plain}
    assert (plain["HOME"], plain[CLUSTER_VARIABLE]) == ("/root", name)
    assert environment_of_ray(name, {VARIABLE: "5"})[VARIABLE] == "5"


def test_serve_idles_more_quietly_unless_the_operator_chose_otherwise(name: str):
    [loop] = [setting for setting in SERVE_SETTINGS if "CONTROL_LOOP" in setting]

    assert environment_of_ray(name, {}).items() >= SERVE_SETTINGS.items()
    assert environment_of_ray(name, {loop: "0.1"})[loop] == "0.1"
