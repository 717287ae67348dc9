"""Nodes are probed once as they join, told when they come, go and lie."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.facts_file import FACTS_FILE, keep_facts
from cluster.names import GPU_LABEL, MEMORY_LABEL, POOL_LABEL
from cluster.ray_inventory import node_name
from cluster.ray_survey import Survey
from cluster.surveyor import Surveyor
from placement.catalogue import load_catalogue
from placement.inventory import Inventory, Pool
from placement.node_facts import NodeFacts
from tests.placement.nodes import a_gpu, a_node

CATALOGUE = load_catalogue()
GPUS = tuple(a_gpu(index) for index in range(8))


def a_ray_node(host: str) -> dict[str, Any]:
    return {
        "NodeID": f"{host:0>8}ffff",
        "NodeManagerHostname": host,
        "Alive": True,
        "Labels": {POOL_LABEL: "h100", GPU_LABEL: "H100-SXM"},
        "Resources": {"GPU": 8.0},
    }


class FakeProbes:
    """A cluster whose hosts have what is in `gpus`, and of which some do not answer."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = list(hosts)
        self.silent: set[str] = set()
        self.gpus: dict[str, Any] = {}
        self.labels: dict[str, dict[str, str]] = {}
        self.looked: list[str] = []
        self.measured: list[str] = []
        self.may_measure = threading.Event()
        self.may_measure.set()

    def nodes(self) -> list[dict[str, Any]]:
        nodes = [a_ray_node(host) for host in self.hosts]
        return [{**node, "Labels": self.labels.get(_host(node), node["Labels"])} for node in nodes]

    def look(self, nodes: Sequence[Mapping[str, Any]]) -> Survey:
        hosts = [node["NodeManagerHostname"] for node in nodes]
        self.looked += hosts
        return Survey(
            tuple(self._facts(node) for node in nodes if _host(node) not in self.silent),
            {node_name(node): "silence" for node in nodes if _host(node) in self.silent},
        )

    def measure(self, nodes: Sequence[Mapping[str, Any]], found: Sequence[NodeFacts]) -> Survey:
        self.may_measure.wait(30)
        self.measured += [facts.host for facts in found]
        return Survey(tuple(found), {})

    def _facts(self, node: Mapping[str, Any]) -> NodeFacts:
        gpus = self.gpus.get(_host(node), GPUS)
        pool = node["Labels"].get(POOL_LABEL, "")
        return a_node(_host(node), node=node_name(node), pool=pool, gpus=gpus, pairs=())


class Twins:
    """The same cluster, whose hosts are all called `a`."""

    def __init__(self, probes: FakeProbes) -> None:
        self._probes = probes
        self.look, self.measure = probes.look, probes.measure

    def nodes(self) -> list[dict[str, Any]]:
        return [{**node, "NodeManagerHostname": "a"} for node in self._probes.nodes()]


def _host(node: Mapping[str, Any]) -> str:
    return str(node["NodeManagerHostname"])


class Told(list[tuple[str, str, str]]):
    def note(self, kind: str, node: str, text: str) -> None:
        self.append((kind, node, text))

    def kinds(self, *wanted: str) -> list[tuple[str, str]]:
        return [(kind, node) for kind, node, _ in self if kind in wanted]


def a_surveyor(folder: Path, probes: FakeProbes, told: Told) -> Surveyor:
    return Surveyor(probes, folder / FACTS_FILE, CATALOGUE, told.note)


async def rounds(surveyor: Surveyor) -> None:
    """Until nothing is being probed."""
    await surveyor.round()
    while surveyor.nodes().pending:
        await asyncio.sleep(0.01)
    await surveyor.round()


async def test_a_node_that_joins_is_looked_at_and_measured_once(tmp_path):
    probes, told = FakeProbes("a", "b"), Told()
    surveyor = a_surveyor(tmp_path, probes, told)
    assert surveyor.nodes().pending  # nothing is known yet

    await rounds(surveyor)
    await rounds(surveyor)

    assert (sorted(probes.looked), sorted(probes.measured)) == (["a", "b"], ["a", "b"])
    assert [facts.host for facts in surveyor.nodes().nodes] == ["a", "b"]
    assert told.kinds("node-joined", "mismatch") == [
        ("node-joined", "a-0000000a"), ("node-joined", "b-0000000b"),
    ]  # fmt: skip


async def test_a_host_without_gpus_is_not_measured(tmp_path):
    probes = FakeProbes("a")
    probes.gpus["a"] = ()

    await rounds(a_surveyor(tmp_path, probes, Told()))

    assert (probes.looked, probes.measured) == (["a"], [])


async def test_a_lie_is_told_once(tmp_path):
    probes, told = FakeProbes("a"), Told()
    probes.gpus["a"] = GPUS[:7]
    surveyor = a_surveyor(tmp_path, probes, told)
    await rounds(surveyor)

    probes.hosts.append("b")
    await rounds(surveyor)

    assert told.kinds("mismatch") == [("mismatch", "a")]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({POOL_LABEL: "b", GPU_LABEL: "H100-SXM", MEMORY_LABEL: "80 GiB"}, "'80 GiB'"),
        ({POOL_LABEL: "b", GPU_LABEL: "H1000"}, "unknown GPU type 'H1000'"),
        ({POOL_LABEL: "b"}, "have no bora.gpu label"),
        ({POOL_LABEL: "b.", GPU_LABEL: "H100-SXM"}, "make no pool 'b.'"),
    ],
)
async def test_labels_that_make_no_sense_are_told_once_and_hide_no_other_lie(
    tmp_path, labels: dict[str, str], said: str
):
    probes, told = FakeProbes("a", "b"), Told()
    probes.labels["b"], probes.gpus["a"] = labels, GPUS[:7]  # of another pool
    surveyor = a_surveyor(tmp_path, probes, told)

    await rounds(surveyor)
    await rounds(surveyor)

    labels_told, count = (text for kind, _, text in told if kind == "mismatch")
    assert said in labels_told
    assert "gpu-count" in count
    assert surveyor.nodes().declared is None


async def test_a_node_with_gpus_and_no_pool_is_told(tmp_path):
    probes, told = FakeProbes("a", "b"), Told()
    probes.labels["b"] = {}

    await rounds(a_surveyor(tmp_path, probes, told))

    [text] = [text for kind, _, text in told if kind == "mismatch"]
    assert text.startswith("b-0000000b has 8 GPUs or slots but no label bora.pool")


async def test_a_lie_of_a_host_that_came_back_is_told_again(tmp_path):
    probes, told = FakeProbes("a", "b"), Told()
    probes.gpus["a"] = GPUS[:7]
    surveyor = a_surveyor(tmp_path, probes, told)

    for hosts in (["a", "b"], ["b"], ["a", "b"]):
        probes.hosts = hosts
        await rounds(surveyor)

    assert told.kinds("mismatch") == [("mismatch", "a")] * 2


async def test_fresh_facts_of_a_host_do_not_pass_for_another_that_is_called_alike(tmp_path):
    keep_facts(tmp_path / FACTS_FILE, [a_node("a", node="a", probed_at_s=time.time())])
    probes = FakeProbes("a", "twin")
    surveyor = Surveyor(Twins(probes), tmp_path / FACTS_FILE, CATALOGUE, Told().note)

    await rounds(surveyor)

    assert len(probes.looked) == 2


async def test_facts_that_cannot_be_kept_end_nothing(tmp_path):
    surveyor = a_surveyor(tmp_path / "gone", FakeProbes("a"), Told())

    await rounds(surveyor)

    assert [facts.host for facts in surveyor.nodes().nodes] == ["a"]


async def test_a_node_that_leaves_is_told_and_forgotten(tmp_path):
    probes, told = FakeProbes("a", "b"), Told()
    surveyor = a_surveyor(tmp_path, probes, told)
    await rounds(surveyor)

    probes.hosts.remove("b")
    await rounds(surveyor)

    assert told.kinds("node-lost") == [("node-lost", "b-0000000b")]
    assert [facts.host for facts in surveyor.nodes().nodes] == ["a"]


async def test_while_engines_hold_the_gpus_other_nodes_are_still_watched(tmp_path):
    probes, told = FakeProbes("a", "b"), Told()
    probes.may_measure.clear()
    surveyor = a_surveyor(tmp_path, probes, told)
    await surveyor.round()

    probes.hosts.remove("b")
    await surveyor.round()

    assert told.kinds("node-lost") == [("node-lost", "b-0000000b")]
    probes.may_measure.set()
    await rounds(surveyor)
    assert [facts.host for facts in surveyor.nodes().nodes] == ["a"]


async def test_a_silent_node_is_asked_again_but_not_for_ever(tmp_path):
    probes, told = FakeProbes("a"), Told()
    probes.silent.add("a")
    surveyor = a_surveyor(tmp_path, probes, told)

    for _ in range(6):
        await rounds(surveyor)

    assert probes.looked == ["a"] * 3
    assert "silence" in told[-1][2]


async def test_what_an_earlier_controller_found_is_not_asked_again(tmp_path):
    await rounds(a_surveyor(tmp_path, FakeProbes("a"), Told()))
    probes = FakeProbes("a")
    surveyor = a_surveyor(tmp_path, probes, Told())

    await rounds(surveyor)

    assert probes.looked == []
    assert [facts.host for facts in surveyor.nodes().nodes] == ["a"]


async def test_old_facts_of_a_host_do_not_pass_for_a_new_nodes(tmp_path):
    keep_facts(tmp_path / FACTS_FILE, [a_node("a", node="a", probed_at_s=1.0)])
    probes = FakeProbes("a")

    await rounds(a_surveyor(tmp_path, probes, Told()))

    assert probes.looked == ["a"]


async def test_the_planner_gets_what_was_measured(tmp_path):
    surveyor = a_surveyor(tmp_path, FakeProbes("a"), Told())
    await rounds(surveyor)
    declared = Inventory(
        pools=(Pool(name="h100", gpu="H100-SXM", gpus_per_node=8, node_names=("a-0000000a",)),)
    )

    [pool] = surveyor.corrected(declared).pools

    assert pool.memory_gib_per_gpu == 79.1
