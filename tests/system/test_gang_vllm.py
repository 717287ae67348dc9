"""A mixture of experts whose two data-parallel copies stand on two Ray nodes, with real vLLM."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.drill_cluster_processes import DrillCluster, drill_cluster
from loadtests.drill_processes import free_ports
from placement.plan import Plan
from placement.spec import parse_yaml
from tests.cluster.test_vllm_nodes import PROMPTS, Running, planned
from tests.system.harness import eventually

pytestmark = pytest.mark.system

FLEET = """
fleet: experts
models:
  - name: chat
    model: nano-mixtral
    dtype: float32
    max_model_len: 4096
    max_num_seqs: 8
    tensor_parallel_size: 1
    nodes_per_replica: 2
    data_parallel_size: 2
gateway: {{http_port: {http}, grpc_port: {grpc}}}
"""


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[DrillCluster, str, list[list[int]]]]:
    """Two workers of one slot, the gateway's URL, and the greedy tokens of one engine alone."""
    http, grpc = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="bora-ep-") as name:
        folder = Path(name)
        alone = Running(
            planned(1, 1), folder
        )  # it starts while Ray does, and ends before a gang is
        try:
            with drill_cluster(folder, workers=("a", "b"), slots=1) as cluster:
                alone.wait()
                tokens = alone.greedy()
                alone.stop()
                fleet = folder / "fleet.yaml"
                fleet.write_text(FLEET.format(http=http, grpc=grpc))
                cluster.bora("deploy", str(fleet), "--address", cluster.address, timeout_s=600)
                yield cluster, f"http://127.0.0.1:{http}", tokens
        finally:
            alone.stop()


def the_replica(cluster: DrillCluster) -> dict[str, Any]:
    """The one that is ready; empty: none is."""
    [variant] = json.loads(cluster.bora("status", "--json"))["variants"]
    ready = [each for each in variant["replicas"] if each["state"] == "ready"]
    return dict(ready[0]) if ready else {}


def greedy(url: str) -> list[list[int]]:
    """Tokens of the prompts, asked all at once."""
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps({"model": "chat", "prompt": PROMPTS, **options}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return [choice["token_ids"] for choice in json.load(response)["choices"]]


def the_plan(cluster: DrillCluster) -> Plan:
    file = next(Path(cluster.env["BORA_STATE"]).rglob("plan.yaml"))
    return parse_yaml(file.read_text(), Plan, source="plan")


def test_copies_on_two_ray_nodes_that_share_experts_answer_as_one_engine_does(
    served: tuple[DrillCluster, str, list[list[int]]],
) -> None:
    cluster, url, alone = served
    replica = eventually(lambda: the_replica(cluster), period_s=1.0)
    [variant] = the_plan(cluster).variants

    assert "--enable-expert-parallel" in variant.shape.engine_args
    ranks = [replica, *replica["followers"]]
    there = [f"{rank['node']}-{rank['node_id'][:8]}" for rank in ranks]
    assert there == [part.node for part in variant.placement[0]]
    assert replica["kv_cache_tokens"] == variant.shape.kv_cache_tokens  # of both copies
    assert greedy(url) == alone


def test_when_a_rank_dies_all_copies_start_anew_and_answer_the_same(
    served: tuple[DrillCluster, str, list[list[int]]],
) -> None:
    cluster, url, alone = served
    before = the_replica(cluster)
    leader = cluster.pid_with("vllm.entrypoints.openai.api_server")

    os.kill(cluster.pid_with("cluster.engines.vllm_follower"), signal.SIGKILL)
    eventually(lambda: not the_replica(cluster))
    after = eventually(lambda: the_replica(cluster), period_s=1.0)

    assert after["replica"] != before["replica"]
    assert cluster.pid_with("vllm.entrypoints.openai.api_server") != leader
    assert greedy(url) == alone
    events = json.loads(cluster.bora("status", "--json"))["events"]
    died = [event["reason"] for event in events if event["kind"] == "replica-died"]
    assert any("rank 1 on" in why and "ended with status" in why for why in died), died
