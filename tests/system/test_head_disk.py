"""The head and its disk are lost; Ray's state is in Redis, and so is what bora's controller knew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.drill_cluster_processes import DrillCluster, drill_cluster
from loadtests.drill_processes import free_ports
from loadtests.processes import CannotRun
from tests.debian_packages import install_missing, is_there
from tests.system.harness import eventually

pytestmark = pytest.mark.ray

FLEET = """
fleet: kept
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
    max_num_seqs: 32
gateway: {{http_port: {http}, grpc_port: {grpc}, auth: keys}}
"""


@pytest.fixture
def redis() -> Iterator[str]:
    """The address of a server that holds all in memory."""
    if os.geteuid() == 0:
        install_missing("redis-server")
    elif not is_there("redis-server"):
        pytest.skip("there is no redis-server: apt-get install redis-server")
    [port] = free_ports(1)
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def cluster(redis: str) -> Iterator[tuple[DrillCluster, str]]:
    """One worker of one slot; and the gateway's URL."""
    http, grpc = free_ports(2)
    kept = {
        "RAY_REDIS_ADDRESS": redis,
        "RAY_external_storage_namespace": "test",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_SERVE_SLOW_STARTUP_WARNING_S": "300",
    }
    with (
        tempfile.TemporaryDirectory(prefix="bora-disk-") as folder,
        drill_cluster(Path(folder), workers=("a",), slots=1, env=kept) as cluster,
    ):
        fleet = Path(folder) / "fleet.yaml"
        fleet.write_text(FLEET.format(http=http, grpc=grpc))
        cluster.bora("deploy", str(fleet), "--address", cluster.address)
        yield cluster, f"http://127.0.0.1:{http}"


def status_of(url: str, key: str) -> int:
    body = {"model": "chat", "prompt": "Tell me", "max_tokens": 8, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0  # the gateway is away


def asked(cluster: DrillCluster, *arguments: str) -> Any:
    """What a command says as JSON; None while there is no controller that it finds."""
    try:
        return json.loads(cluster.bora(*arguments, "--json"))
    except CannotRun:
        return None


def kept(redis: str) -> bytes:
    """All that Ray has there."""
    ask = ["redis-cli", "-p", redis.rpartition(":")[2]]
    keys = subprocess.run([*ask, "keys", "*"], capture_output=True, text=True, check=True).stdout
    hashes = [subprocess.run([*ask, "--no-raw", "hvals", key], capture_output=True, check=False)
              for key in keys.split()]  # fmt: skip
    return b"".join(each.stdout for each in hashes).replace(b'\\"', b'"')


def used(cluster: DrillCluster) -> int:
    """Requests that are counted."""
    totals = asked(cluster, "usage") or {"rows": ()}
    return sum(row["requests"] for row in totals["rows"])


def test_a_head_without_its_disk_knows_fleet_tenants_and_usage_again(
    cluster: tuple[DrillCluster, str], redis: str
):
    nodes, url = cluster
    made = asked(nodes, "keys", "create", "acme", "--budget-tokens", "100000")
    gone = asked(nodes, "keys", "create", "left")
    nodes.bora("keys", "revoke", "left")
    eventually(lambda: status_of(url, made["key"]) == 200)
    assert [status_of(url, made["key"]) for _ in range(4)] == [200] * 4
    eventually(lambda: used(nodes) == 5)
    engine = nodes.pid_with("cluster.engines.sim_server")
    eventually(lambda: b'"requests":5' in kept(redis))  # usage goes there every few seconds
    assert made["key"].encode() not in kept(redis)

    nodes.kill_node("head")
    shutil.rmtree(nodes.env["BORA_STATE"])
    # The worker's raylet, on the same host here, would be taken for a cluster that still runs.
    (Path(nodes.env["RAY_TMPDIR"]) / "ray_current_cluster").unlink()
    nodes.start_head()

    status = eventually(lambda: (s := asked(nodes, "status")) and s["gateways"] and s)
    assert status["fleet"] == "kept"
    assert [tenant["name"] for tenant in asked(nodes, "keys", "list")["tenants"]] == ["acme"]
    assert used(nodes) >= 5
    eventually(lambda: status_of(url, made["key"]) == 200)
    assert status_of(url, gone["key"]) == 401
    assert nodes.pid_with("cluster.engines.sim_server") == engine
