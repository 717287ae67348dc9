"""A host that dies while replicas start there is no reason to never start them again."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loadtests.drill_cluster_processes import DrillCluster, drill_cluster
from loadtests.drill_processes import free_ports
from tests.system.harness import PATIENCE_S, eventually

pytestmark = pytest.mark.ray

# As many as Serve takes for proof that none of them can start.
FLEET = """
fleet: second-tries
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
    max_num_seqs: 32
    replicas: {{min: 3, max: 3}}
    engine_args: [--sim-start-delay-s=8]
gateway: {{http_port: {http}, grpc_port: {grpc}}}
"""


def states(cluster: DrillCluster) -> list[str]:
    """Of the replicas."""
    [variant] = json.loads(cluster.bora("status", "--json"))["variants"] or [{"replicas": []}]
    return [replica["state"] for replica in variant["replicas"]]


def test_replicas_that_were_starting_on_a_host_that_died_start_on_another():
    http, grpc = free_ports(2)
    with (
        tempfile.TemporaryDirectory(prefix="bora-ray-") as folder,
        drill_cluster(Path(folder), workers=("a",), slots=3) as cluster,
        ThreadPoolExecutor(1) as pool,
    ):
        fleet = Path(folder) / "fleet.yaml"
        fleet.write_text(FLEET.format(http=http, grpc=grpc))
        deploy = ["deploy", str(fleet), "--address", cluster.address]
        deployed = pool.submit(cluster.bora, *deploy, timeout_s=PATIENCE_S)
        engine = "cluster.engines.sim_server"
        eventually(lambda: deployed.done() or len(cluster.pids_with(engine, "a")) == 3)
        assert not deployed.done(), deployed.result()

        cluster.kill_node("a")
        cluster.start_worker("b")

        deployed.result()
        eventually(lambda: states(cluster) == ["ready"] * 3)
        told = json.loads(cluster.bora("events", "--json"))["events"]
    assert any("gave up starting replicas" in event["text"] for event in told)
