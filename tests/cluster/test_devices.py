"""Exact GPUs: the planned ones, never two engines on one, and free only when nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.devices import DeviceLocks, device_environment
from cluster.errors import EngineFailed
from cluster.processes import start_guarded, stop_guarded


def locks(folder: Path, total: int = 4) -> DeviceLocks:
    return DeviceLocks("node", [str(gpu) for gpu in range(total)], folder)


def test_a_replica_gets_the_gpus_of_the_plan(tmp_path: Path):
    held = locks(tmp_path).hold([(2, 3), (0, 1)], 2, owner="r1")

    assert held.gpus == (2, 3)


def test_the_next_replica_of_the_variant_gets_the_next_planned_gpus(tmp_path: Path):
    planned = [(2, 3), (0, 1)]
    locks(tmp_path).hold(planned, 2, owner="r1")

    assert locks(tmp_path).hold(planned, 2, owner="r2").gpus == (0, 1)


def test_who_was_not_planned_here_gets_gpus_that_lie_together(tmp_path: Path):
    locks(tmp_path).hold([(1,)], 1, owner="r1")

    assert locks(tmp_path).hold([], 2, owner="r2").gpus == (2, 3)


def test_a_smaller_node_than_the_planned_ones_gives_what_it_has(tmp_path: Path):
    assert locks(tmp_path, 2).hold([(6, 7)], 2, owner="r1").gpus == (0, 1)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "None"),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, "0,2"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a"}, "GPU-b,GPU-a"),
        ({"CUDA_VISIBLE_DEVICES": "3", "BORA_GPUS": "GPU-a,GPU-b"}, "GPU-a,GPU-b"),
    ],
)
def test_a_ray_nodes_gpus_are_those_that_it_was_started_to_see(
    environment: dict[str, str], said: str
):
    """Without them a replica that Ray gave GPU 0 of 0 and 2 could take GPU 1, which is another's."""
    script = (
        "import os; from cluster.seat import gpus_of_ray_node; "
        "os.environ['CUDA_VISIBLE_DEVICES'] = '7'; "  # as Ray does for a worker
        "print(gpus_of_ray_node())"
    )
    clean = {key: value for key, value in os.environ.items() if "VISIBLE" not in key}
    output = subprocess.check_output(
        [sys.executable, "-c", script], env={**clean, **environment}, text=True
    )

    assert output.strip() == said


def test_scattered_gpus_are_better_than_none(tmp_path: Path):
    locks(tmp_path).hold([(1,)], 1, owner="r1")
    locks(tmp_path).hold([(2,)], 1, owner="r2")

    assert locks(tmp_path).hold([], 2, owner="r3").gpus == (0, 3)


def test_no_gpu_is_held_twice_and_the_refusal_names_who_holds_them(tmp_path: Path):
    locks(tmp_path, 2).hold([(0, 1)], 2, owner="chat-r1")

    with pytest.raises(EngineFailed, match=r"no 1 of the node's 2 GPUs.*GPU 0 is held by chat-r1"):
        locks(tmp_path, 2).hold([(0,)], 1, owner="r2", timeout_s=0, sleep=lambda _: None)


def test_more_gpus_than_the_node_has_are_refused(tmp_path: Path):
    with pytest.raises(EngineFailed, match="the node has too few"):
        locks(tmp_path, 2).hold([], 4, owner="r", timeout_s=0, sleep=lambda _: None)


def test_gpus_of_two_ray_nodes_on_one_host_are_not_the_same(tmp_path: Path):
    DeviceLocks("a", ["0"], tmp_path).hold([(0,)], 1, owner="r1")

    assert DeviceLocks("b", ["0"], tmp_path).hold([(0,)], 1, owner="r2").gpus == (0,)


def test_gpus_are_free_when_the_engine_is_gone_not_when_its_starter_lets_go(tmp_path: Path):
    held = locks(tmp_path).hold([(0,)], 1, owner="r1")
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    guard = start_guarded(command, log=tmp_path / "log", files=held.files)
    held.let_go()

    assert locks(tmp_path).hold([(0,)], 1, owner="r2").gpus == (1,)

    stop_guarded(guard)
    assert locks(tmp_path).hold([(0,)], 1, owner="r3").gpus == (0,)


def test_the_planned_gpus_of_a_dead_holder_are_waited_for(tmp_path: Path):
    """Its engine takes a moment to end; other GPUs would be free at once."""
    go = tmp_path / "go"
    engine = f"""
import pathlib, signal, time
signal.signal(15, signal.SIG_IGN)
while not pathlib.Path({str(go)!r}).exists():
    time.sleep(0.05)
"""
    script = f"""
import sys
from pathlib import Path
from cluster.devices import DeviceLocks
from cluster.processes import start_guarded
held = DeviceLocks("node", list("0123"), Path({str(tmp_path)!r})).hold([(0,)], 1, owner="r1")
command = [sys.executable, "-c", {engine!r}]
start_guarded(command, log=Path({str(tmp_path / "log")!r}), files=held.files, grace_s=300.0)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        go.touch()
        time.sleep(seconds)

    held = locks(tmp_path).hold([(0,)], 1, owner="r2", timeout_s=300, sleep=sleep)

    assert held.gpus == (0,)
    assert waits


def test_cuda_sees_exactly_these_gpus_by_pci_address():
    assert device_environment((2, 3), ["a", "b", "c", "d"]) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "c,d",
    }
