"""bora on a Ray cluster that somebody else started: it comes, serves and goes; Ray stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from cluster.local_ray import LocalRay, start_local_ray
from cluster.names import GPU_LABEL, POOL_LABEL
from loadtests.drill_processes import free_ports
from tests.system.harness import BORA, PATIENCE_S

pytestmark = pytest.mark.ray

FLEET = """
fleet: guest
models:
  - {{name: chat, model: mixtral-8x7b, engine: sim, tensor_parallel_size: 2, max_model_len: 8192}}
gateway: {{http_port: {http}, grpc_port: {grpc}}}
"""


@pytest.fixture
def somebodys_ray(tmp_path: Path) -> Iterator[LocalRay]:
    """A node that says it has eight H100s: Ray counts them, and simulated engines need none."""
    ray = start_local_ray(
        resources={},
        num_gpus=8,
        labels={POOL_LABEL: "h100", GPU_LABEL: "H100-SXM"},
        run_dir=tmp_path / "ray",
    )
    try:
        yield ray
    finally:
        ray.stop()


async def test_deploy_installs_bora_and_down_takes_it_away(somebodys_ray: LocalRay, tmp_path: Path):
    http, grpc = free_ports(2)
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET.format(http=http, grpc=grpc))
    env = {**os.environ, **somebodys_ray.env, "BORA_STATE": str(tmp_path / "state")}

    def bora(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BORA, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    deployed = bora("deploy", str(fleet), "--address", somebodys_ray.address)
    assert deployed.returncode == 0, deployed.stderr
    [variant] = json.loads(bora("status", "--json").stdout)["variants"]
    assert (variant["pool"], variant["ready"]) == ("h100", 1)
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{http}/v1/models") as response,
    ):
        assert [model["id"] for model in (await response.json())["data"]] == ["chat"]

    planned = bora("plan", str(fleet), "--json")  # without an inventory: of the live cluster
    assert json.loads(planned.stdout)["gpus_total"] == 8

    assert bora("down").returncode == 0
    assert bora("status").returncode == 4
    assert somebodys_ray.process.poll() is None
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"http://127.0.0.1:{http}/health")


def test_deploying_where_no_ray_answers_is_exit_4(tmp_path: Path):
    [port] = free_ports(1)
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET.format(http=0, grpc=0))
    env = {**os.environ, "BORA_STATE": str(tmp_path / "state")}

    command = [*BORA, "deploy", str(fleet), "--address", f"127.0.0.1:{port}"]
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )

    assert result.returncode == 4
    assert str(port) in result.stderr
