"""Figures of the measuring process find their way into the facts of the right devices."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.probes import host
from cluster.probes.node import probe, silent
from cluster.probes.speeds import merged, read, with_speeds
from placement.node_facts import PairFacts
from tests.placement.nodes import a_4090, a_gpu, a_node


def an_answer(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "device": "cuda",
        "ranks": 2,
        "cuda_version": "13.0",
        "took_s": 4.0,
        "copy_bytes_per_s": 2e12,
        "all_reduce_s": 3e-5,
        "gpus": [
            {"uuid": "GPU-1", "torch_memory_bytes": 100, "host_to_device_bytes_per_s": 5e10},
            {"uuid": "GPU-0", "torch_memory_bytes": 200, "host_to_device_bytes_per_s": 2e10},
        ],
        "pairs": [a_copy(0, 1), a_copy(1, 0)],
    }
    return {**fields, **changes}


def a_copy(first: int, second: int, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "first": first, "second": second, "peer_access": True, "copy_correct": True,
        "copy_bytes_per_s": 1e11,
    }  # fmt: skip
    return {**fields, **changes}


def a_pair_of_gpus() -> Any:
    gpus = tuple(
        gpu.model_copy(update={"torch_memory_bytes": None}) for gpu in (a_gpu(0), a_4090(1))
    )
    return a_node(gpus=gpus, pairs=(PairFacts(first=0, second=1, path="PHB", peer="OK"),))


def test_torch_may_count_gpus_in_another_order_than_the_driver():
    facts = merged(a_pair_of_gpus(), an_answer())

    assert [gpu.torch_memory_bytes for gpu in facts.gpus] == [200, 100]
    assert facts.gpus[0].host_to_device_bytes_per_s == 2e10
    assert facts.versions["cuda"] == "13.0"
    assert facts.measured is not None
    assert facts.measured.all_reduce_s == 3e-5


def test_a_pair_is_right_if_both_directions_are_and_as_fast_as_the_slower():
    lying = an_answer(pairs=[a_copy(0, 1, copy_correct=False), a_copy(1, 0, copy_bytes_per_s=3e10)])

    [pair] = merged(a_pair_of_gpus(), lying).pairs

    assert pair.copy_correct is False
    assert (pair.path, pair.copy_bytes_per_s) == ("PHB", 3e10)


def test_cuda_has_the_last_word_on_peer_access():
    barred = an_answer(pairs=[a_copy(0, 1, peer_access=False)])

    [pair] = merged(a_pair_of_gpus(), barred).pairs

    assert pair.peer == "CUDA says no"


def test_gpus_that_the_driver_did_not_list_are_left_out():
    facts = merged(a_node(gpus=(a_gpu(0),), pairs=()), an_answer())

    assert len(facts.gpus) == 1
    assert facts.pairs == ()


def test_busy_gpus_are_told_and_keep_what_is_known():
    answer = an_answer(problem="GPU [0] in use: nothing was timed there", pairs=[])
    del answer["all_reduce_s"], answer["copy_bytes_per_s"]

    facts = merged(a_pair_of_gpus(), answer)

    assert facts.measured is not None
    assert "in use" in facts.measured.problem
    assert facts.gpus[0].torch_memory_bytes == 200


def test_a_measurement_that_does_not_end_is_ended_and_told():
    facts = with_speeds(a_node(), silent, timeout_s=0.01)

    assert facts.measured is not None
    assert "not done within" in facts.measured.problem
    assert facts.problems == (f"speeds: {facts.measured.problem}",)
    assert facts.gpus == a_node().gpus


def test_only_interfaces_with_a_device_count_and_infiniband_ports_that_are_active(tmp_path):
    for name, files in {
        "net/eth0": {"speed": "25000", "operstate": "up", "device": ""},
        "net/eth1": {"speed": "100000", "operstate": "down", "device": ""},
        "net/lo": {"operstate": "unknown"},
        "net/virtio": {"speed": "-1", "operstate": "up", "device": ""},
        "infiniband/mlx5_0/ports/1": {"rate": "400 Gb/sec (4X NDR)", "state": "4: ACTIVE"},
        "infiniband/mlx5_1/ports/1": {"rate": "400 Gb/sec (4X NDR)", "state": "1: DOWN"},
    }.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)

    found = {nic.name: nic.gbps for nic in host.nics(tmp_path)}

    assert found == {"eth0": 25.0, "virtio": None, "mlx5_0/1": 400.0}


def test_a_link_is_counted_once_whatever_shows_it(tmp_path):
    """100 Gbit/s are not 200 because a port is an interface and an InfiniBand port, or has VFs."""
    card, part = tmp_path / "pci" / "card", tmp_path / "pci" / "part"
    for folder in (card, part / "physfn"):
        folder.mkdir(parents=True)
    for name, device, files in (
        ("net/eth0", card, {"speed": "100000", "operstate": "up"}),
        ("net/eth0v0", part, {"speed": "100000", "operstate": "up"}),
        ("infiniband/mlx5_0", card, {}),
        ("infiniband/mlx5_0/ports/1", None, {"rate": "100 Gb/sec (4X EDR)", "state": "4: ACTIVE"}),
    ):
        folder = tmp_path / "class" / name
        folder.mkdir(parents=True)
        if device:
            (folder / "device").symlink_to(device)
        for file, text in files.items():
            (folder / file).write_text(text)

    assert [(nic.name, nic.gbps) for nic in host.nics(tmp_path / "class")] == [("eth0", 100.0)]


@pytest.mark.parametrize("output", ["", "goodbye"])
def test_figures_that_do_not_come_are_a_problem(output: str):
    facts = read(a_node(), output, "all-reduce")

    assert facts.measured is not None
    assert facts.measured.problem == f"printed no figures but {output!r}: all-reduce"


def test_a_cache_that_cannot_be_looked_into_is_a_problem_and_not_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / ("long" * 100)))

    facts = probe(measure=False)

    assert facts.disk is None
    assert "the model cache (HF_HOME)" in facts.problems[-1]


def test_a_cache_that_is_not_there_yet_has_the_room_of_where_it_will_be(tmp_path):
    facts = host.disk(tmp_path / "not" / "yet", measure=False)

    assert facts.free_bytes > 0
    assert facts.cached == {}


def test_cached_repositories_are_counted_and_the_sample_is_removed(tmp_path):
    blobs = tmp_path / "models--mistralai--Ministral-3-8B" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a").write_bytes(b"x" * 1000)

    facts = host.disk(tmp_path, measure=True)

    assert facts.cached == {"mistralai/Ministral-3-8B": 1000}
    assert facts.read_bytes_per_s
    assert [entry.name for entry in tmp_path.iterdir()] == ["models--mistralai--Ministral-3-8B"]
