"""Nodes on a real Ray cluster: probed, compared with their labels, and doctored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.local_ray import LocalRay, start_local_ray
from cluster.names import GPU_LABEL, KV_CACHE_LABEL, MEMORY_LABEL, POOL_LABEL, SLOT
from cluster.processes import start_guarded, stop_guarded, tail
from loadtests.drill_processes import free_ports
from tests.system.harness import BORA, PATIENCE_S, eventually

pytestmark = pytest.mark.ray

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SIM = "{{name: chat, model: mixtral-8x7b, engine: sim, pools: [{pool}], max_model_len: 8192}}"
REAL = "{{name: chat, model: mixtral-8x7b, pools: [{pool}], max_model_len: 8192}}"
FLEET = "fleet: guest\nmodels:\n  - {model}\ngateway: {{http_port: {http}, grpc_port: {grpc}}}\n"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    """A machine as two Ray nodes: one with slots, and one that says it has eight H100s."""
    folder = tmp_path_factory.mktemp("ray")
    labels = {
        POOL_LABEL: "slots", GPU_LABEL: "cpu", MEMORY_LABEL: "4.0", KV_CACHE_LABEL: "1.0",
        "zone": "a",
    }  # fmt: skip
    ray = start_local_ray(resources={SLOT: 4.0}, num_gpus=0, labels=labels, run_dir=folder)
    try:
        with joined(ray, {POOL_LABEL: "h100", GPU_LABEL: "H100-SXM"}, num_gpus=8, folder=folder):
            yield ray
    finally:
        ray.stop()


@contextmanager
def joined(ray: LocalRay, labels: dict[str, str], *, num_gpus: int, folder: Path) -> Iterator[None]:
    """One more Ray node on this machine."""
    log = folder / "second.log"
    agent, agent_grpc, metrics = free_ports(3)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", ray.address]
    command += ["--node-ip-address", "127.0.0.1", "--num-gpus", str(num_gpus)]
    command += ["--labels", ",".join(f"{key}={value}" for key, value in labels.items())]
    command += ["--dashboard-agent-listen-port", str(agent), "--metrics-export-port", str(metrics)]
    command += ["--dashboard-agent-grpc-port", str(agent_grpc)]
    command += ["--object-store-memory", str(100 * 2**20), "--num-cpus", "1", "--block"]
    node = start_guarded(command, log=log, env=ray.env, grace_s=2)
    try:
        eventually(lambda: "Ray runtime started" in tail(log, 200) or node.poll() is not None)
        assert node.poll() is None, tail(log, 40)
        yield
    finally:
        stop_guarded(node, PATIENCE_S)


@pytest.fixture
def bora(box: LocalRay, tmp_path: Path) -> Run:
    env = {**os.environ, **box.env, "BORA_STATE": str(tmp_path / "state"), "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BORA, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    return run


def a_fleet(folder: Path, model: str, pool: str) -> Path:
    http, grpc = free_ports(2)
    path = folder / "fleet.yaml"
    path.write_text(FLEET.format(model=model.format(pool=pool), http=http, grpc=grpc))
    return path


def rows(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return json.loads(result.stdout)["checks"]


def test_the_doctor_examines_a_live_cluster_and_finds_the_node_that_lies(box: LocalRay, bora: Run):
    result = bora("doctor", "--address", box.address, "--json")

    assert result.returncode == 3, result.stderr
    failed = [row for row in rows(result) if row["status"] == "failed"]
    assert [row["check"] for row in failed] == ["GPUs"]
    assert "gpu-count: declared 8 x H100-SXM; found no GPU" in failed[0]["found"]
    assert "nvidia-smi" in failed[0]["cure"]
    fine = {row["check"]: row["found"] for row in rows(result) if row["status"] == "ok"}
    assert "ray 2.60.0" in fine["versions"]
    assert "all-reduce of 1 MiB over 2" in fine["speeds"]  # measured by a task on the node


def test_an_engine_is_not_sent_to_gpus_that_are_not_there(box: LocalRay, bora: Run, tmp_path: Path):
    fleet = a_fleet(tmp_path, REAL, "h100")

    result = bora("deploy", str(fleet), "--address", box.address)

    assert result.returncode == 3, result.stderr
    assert "error: " in result.stderr
    assert "gpu-count: declared 8 x H100-SXM; found no GPU" in result.stderr
    assert "--trust-inventory" in result.stderr
    assert bora("status").returncode == 4  # nothing was started


def test_a_simulated_fleet_goes_on_with_a_warning_and_its_story_is_told(
    box: LocalRay, bora: Run, tmp_path: Path
):
    deployed = bora("deploy", str(a_fleet(tmp_path, SIM, "h100")), "--address", box.address)
    assert deployed.returncode == 0, deployed.stderr
    assert "warning: " in deployed.stderr

    def told() -> dict[str, Any]:
        events = json.loads(bora("events", "--json").stdout)["events"]
        kinds = {event["kind"]: event for event in events}
        return kinds if "mismatch" in kinds else {}

    try:
        kinds = eventually(told)
        assert {"node-joined", "deployed", "replica-started", "replica-ready"} <= kinds.keys()
        assert "gpu-count" in kinds["mismatch"]["text"]
        assert kinds["replica-ready"]["node"]
        assert kinds["replica-ready"]["model"] == "chat"
        [variant] = json.loads(bora("status", "--json").stdout)["variants"]
        assert len(variant["replicas"][0]["gpus"]) == variant["gpus_per_replica"]
        assert "mismatch" in bora("events").stdout
        planned = json.loads(bora("plan", str(tmp_path / "fleet.yaml"), "--json").stdout)
        assert planned["gpus_total"] == 12
    finally:
        assert bora("down").returncode == 0


def test_the_doctor_examines_this_machine_without_ray(tmp_path: Path):
    env = {**os.environ, "BORA_STATE": str(tmp_path / "state"), "HF_HUB_OFFLINE": "1"}
    command = [*BORA, "doctor", "--quick", "--json"]

    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)  # noqa: PLW1510

    found = {row["check"]: row for row in rows(result)}
    assert {"driver", "GPUs", "versions", "disk", "memory", "models", "clock"} <= found.keys()
    assert found["models"]["found"].endswith("HF_HUB_OFFLINE is set")
    failed = [row for row in found.values() if row["status"] == "failed"]
    assert result.returncode == (3 if failed else 0)
