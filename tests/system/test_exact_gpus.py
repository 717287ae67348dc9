"""Engines run on the GPUs of the plan, of which Ray here believes that they exist."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.drill_cluster_processes import DrillCluster
from placement.plan import Plan
from placement.spec import parse_yaml
from tests.system.harness import eventually, served

pytestmark = pytest.mark.ray

FLEET = """
fleet: gpus
models:
  - {{name: small, model: mistral-7b-v0.3, engine: sim, tensor_parallel_size: 1,
     max_model_len: 8192, replicas: {{min: 2, max: 3}}, scaling: {{scale_down_delay_s: 600}}}}
  - {{name: large, model: mistral-small-3.2-24b-2506, engine: sim, tensor_parallel_size: 4,
     max_model_len: 8192}}
gateway: {{http_port: {http}, grpc_port: {grpc}}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[DrillCluster]:
    """One worker of eight GPUs."""
    with served(FLEET, workers=("a",), slots=0, gpus=8) as (cluster, _):
        yield cluster


def replicas(cluster: DrillCluster, model: str) -> list[dict[str, Any]]:
    variants = json.loads(cluster.bora("status", "--json"))["variants"]
    [variant] = [each for each in variants if each["model"] == model]
    return [each for each in variant["replicas"] if each["state"] == "ready"]


def planned(cluster: DrillCluster, model: str) -> list[tuple[int, ...]]:
    file = next(Path(cluster.env["BORA_STATE"]).rglob("plan.yaml"))
    plan = parse_yaml(file.read_text(), Plan, source="plan")
    [variant] = [each for each in plan.variants if each.model == model]
    return sorted(part.gpus for replica in variant.placement for part in replica)


def seen(cluster: DrillCluster, replica: dict[str, Any]) -> str:
    """What the engine is told to see; its guard's children are the engine."""
    environment = (Path("/proc") / str(replica["pid"]) / "environ").read_bytes().split(b"\0")
    [value] = [each for each in environment if each.startswith(b"CUDA_VISIBLE_DEVICES=")]
    return value.decode().partition("=")[2]


@pytest.mark.parametrize("model", ["small", "large"])
def test_engines_see_exactly_the_gpus_of_the_plan(cluster: DrillCluster, model: str):
    found = replicas(cluster, model)

    assert sorted(tuple(each["gpus"]) for each in found) == planned(cluster, model)
    for each in found:
        assert seen(cluster, each) == ",".join(map(str, each["gpus"]))


def test_nothing_is_reported_as_misplaced(cluster: DrillCluster):
    variants = json.loads(cluster.bora("status", "--json"))["variants"]

    assert [variant["misplaced"] for variant in variants] == [[], []]


def test_the_successor_of_an_engine_that_dies_gets_its_gpus(cluster: DrillCluster):
    """Others are free, and Ray would give any."""
    [before] = replicas(cluster, "large")

    os.kill(before["pid"], signal.SIGKILL)

    def successor() -> list[dict[str, Any]]:
        return [each for each in replicas(cluster, "large") if each["replica"] != before["replica"]]

    [after] = eventually(successor, 60, 0.5)
    assert after["gpus"] == before["gpus"]


def test_a_replica_beyond_the_plan_gets_gpus_that_nobody_has(cluster: DrillCluster):
    cluster.bora("scale", "small", "3")

    found = eventually(lambda: (r := replicas(cluster, "small")) and len(r) == 3 and r, 60, 0.5)
    gpus = [gpu for each in [*found, *replicas(cluster, "large")] for gpu in each["gpus"]]
    assert len(gpus) == len(set(gpus)) == 7
