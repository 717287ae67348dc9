"""Two replicas of two nodes each, on five Ray nodes: each stands on its planned ones, alone."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loadtests.drill_cluster_processes import DrillCluster, drill_cluster
from loadtests.drill_processes import free_ports
from placement.plan import Plan
from placement.spec import parse_yaml
from tests.cluster.fake_hub import Hub, running_hub
from tests.lora_files import an_adapter
from tests.system.harness import eventually

pytestmark = pytest.mark.ray

REPO = "acme/legal-lora"
FLEET = """
fleet: gangs
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    nodes_per_replica: 2
    max_model_len: 8192
    max_num_seqs: 32
    replicas: {{min: 2, max: 2}}
    lora: {{max_loras: 4, max_lora_rank: 16}}
    adapters: {{legal: {repo}, local: {folder}}}
gateway: {{http_port: {http}, grpc_port: {grpc}}}
"""
WORKERS = ("a", "b", "c", "d", "e")


@dataclass(frozen=True, slots=True)
class Gangs:
    """What the tests look at."""

    cluster: DrillCluster
    hub: Hub

    def variant(self) -> dict[str, Any]:
        """As `bora status` shows it."""
        [variant] = json.loads(self.cluster.bora("status", "--json"))["variants"]
        return dict(variant)

    def ready(self) -> list[dict[str, Any]]:
        """Replicas that serve."""
        return [each for each in self.variant()["replicas"] if each["state"] == "ready"]

    def sets(self) -> list[list[str]]:
        """Nodes of each that serves, by rank, as plans name them; sorted."""
        return sorted(nodes_of(replica) for replica in self.ready())

    def planned(self) -> list[list[str]]:
        """The same of the plan."""
        file = next(Path(self.cluster.env["BORA_STATE"]).rglob("plan.yaml"))
        [variant] = parse_yaml(file.read_text(), Plan, source="plan").variants
        return sorted([part.node for part in replica] for replica in variant.placement)

    def leaders(self) -> list[int]:
        """Processes of ranks 0."""
        return [pid for pid in self.cluster.pids() if "--node-rank 0" in command(pid)]

    def kill_node(self, node: str) -> None:
        """The one that plans call so."""
        [name] = [name for name in WORKERS if self._is(name, node)]
        self.cluster.kill_node(name)

    def _is(self, name: str, node: str) -> bool:
        """Ray's id of a node stands in its raylet's command line."""
        return any(node.rpartition("-")[2] in command(pid) for pid in self.cluster.pids(name))

    def events(self) -> list[str]:
        """Their texts."""
        status = json.loads(self.cluster.bora("status", "--json"))
        return [event["text"] for event in status["events"]]


def nodes_of(replica: dict[str, Any]) -> list[str]:
    ranks = [replica, *replica["followers"]]
    return [f"{rank['node']}-{rank['node_id'][:8]}" for rank in ranks]


def command(pid: int) -> str:
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    return "" if b"guard.py" in words else words.replace(b"\0", b" ").decode()


@pytest.fixture(scope="module")
def gangs() -> Iterator[Gangs]:
    """Both replicas serve."""
    http, grpc = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="bora-gangs-") as name, running_hub() as hub:
        folder = Path(name)
        adapter = an_adapter(folder / "legal", seed=1, num_layers=1)
        hub.publish(REPO, {path.name: path.read_bytes() for path in adapter.iterdir()})
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(folder / "cache")}
        caches = {name: {"HF_HUB_CACHE": str(folder / f"cache-{name}")} for name in WORKERS}
        with drill_cluster(folder, workers=WORKERS, slots=1, env=env, env_of=caches) as cluster:
            fleet = folder / "fleet.yaml"
            fleet.write_text(FLEET.format(repo=REPO, folder=adapter, http=http, grpc=grpc))
            cluster.bora("deploy", str(fleet), "--address", cluster.address)
            gangs = Gangs(cluster, hub)
            eventually(lambda: len(gangs.ready()) == 2)
            yield gangs


def test_each_replica_stands_on_the_nodes_of_a_planned_one_in_its_order(gangs: Gangs) -> None:
    assert gangs.sets() == gangs.planned()
    assert gangs.variant()["misplaced"] == []
    assert len({node for nodes in gangs.sets() for node in nodes}) == 4


def test_controller_and_gateway_stand_on_the_head_of_nodes_that_share_its_address(
    gangs: Gangs,
) -> None:
    for actor in ("ControllerActor", "GatewayActor"):
        assert gangs.cluster.pids_with(f"ray::{actor}", "head"), actor


def test_adapters_are_brought_to_every_node_of_a_gang_at_one_path_or_not_loaded(
    gangs: Gangs,
) -> None:
    """The nodes share a file system; their caches differ, as they must not."""

    def tried() -> bool:
        return all(
            "local" in each["adapters"] and "legal" in each["adapter_failures"]
            for each in gangs.ready()
        )

    eventually(tried, period_s=0.5)
    for replica in gangs.ready():
        why = replica["adapter_failures"]["legal"]
        assert f"for rank 1 on {replica['followers'][0]['node']}, but in " in why
        assert "the same HF_HUB_CACHE" in why
    fetched = [path for path, start in gangs.hub.starts if path.endswith(".safetensors")]
    assert len(fetched) == 4  # each node its own


def test_gangs_that_die_at_once_come_back_each_on_its_own_nodes(gangs: Gangs) -> None:
    before = {replica["replica"] for replica in gangs.ready()}

    for pid in gangs.leaders():
        os.kill(pid, signal.SIGKILL)

    def successors() -> bool:
        now = {replica["replica"] for replica in gangs.ready()}
        return len(now) == 2 and not now & before

    eventually(successors, period_s=0.5)
    assert gangs.sets() == gangs.planned()


def test_a_gang_that_lost_a_node_takes_the_spare_one_and_none_of_the_other_gang(
    gangs: Gangs,
) -> None:
    lost, other = sorted(gangs.ready(), key=nodes_of)

    gangs.kill_node(nodes_of(lost)[1])

    def moved() -> bool:
        now = {replica["replica"] for replica in gangs.ready()}
        return len(now) == 2 and lost["replica"] not in now

    eventually(moved, period_s=0.5)
    assert other["replica"] in {replica["replica"] for replica in gangs.ready()}
    [there] = [nodes for nodes in gangs.sets() if nodes != nodes_of(other)]
    assert nodes_of(lost)[0] in there
    assert not set(there) & set(nodes_of(other))
    [told] = [text for text in gangs.events() if "of which" in text]
    assert told.endswith("but those that other replicas are planned on")


def test_without_a_spare_node_it_waits_and_the_status_says_for_what(gangs: Gangs) -> None:
    planned = {node for nodes in gangs.planned() for node in nodes}
    [lost] = [each for each in gangs.ready() if not set(nodes_of(each)) <= planned]
    [other] = [each for each in gangs.ready() if each["replica"] != lost["replica"]]
    [spare] = set(nodes_of(lost)) - planned

    gangs.kill_node(spare)

    waiting = eventually(lambda: gangs.variant()["waiting"], period_s=0.5)
    assert "a replica waits for 1 bora_slot on each of 2 nodes of pool sim" in waiting
    assert "of the planned nodes" in waiting
    assert waiting.endswith(" is gone")
    eventually(lambda: [each["replica"] for each in gangs.ready()] == [other["replica"]])


def test_what_waits_does_not_hold_up_bora_down(gangs: Gangs) -> None:
    assert gangs.variant()["waiting"]

    gangs.cluster.bora("down", timeout_s=45)  # Serve itself would wait 60 s for it

    assert not gangs.cluster.pids_with("ray::ServeReplica")
