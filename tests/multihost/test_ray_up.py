"""A real `ray up` over ssh: pools, a mixed fleet, gateways on two hosts, and nothing left behind."""

from __future__ import annotations

import json
import textwrap
import time
from typing import Any

import pytest

from tests.multihost.conftest import PYTHON, Cluster
from tests.multihost.lab import OPERATOR
from tests.system.harness import eventually

pytestmark = pytest.mark.multihost
NODES = """
import json, ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print(json.dumps([
    {"host": n["NodeManagerHostname"], "pool": n["Labels"].get("bora.pool", ""),
     "gpus": n["Resources"].get("GPU", 0), "id": n["NodeID"]}
    for n in ray.nodes() if n["Alive"]
]))
"""
FLEET = """
fleet: mixed
models:
  - {name: small, model: mistral-7b-v0.3, engine: sim, pools: [rtx4090], tensor_parallel_size: 1,
     max_model_len: 8192, replicas: {min: 2, max: 2}}
  - {name: chat, model: mixtral-8x7b, engine: sim, pools: [a100], tensor_parallel_size: 2,
     max_model_len: 8192}
  - {name: large, model: mistral-large-2411, engine: sim, pools: [h100], tensor_parallel_size: 8,
     max_model_len: 8192}
  - {name: nano, model: nano-large-3, max_model_len: 2048, max_num_seqs: 8, pools: [cpu]}
gateway: {http_port: 8000, grpc_port: 8001, host: 0.0.0.0, replicas: 2}
"""
INVENTORY = """
pools:
  - {name: rtx4090, gpu: RTX-4090, gpus_per_node: 4}
  - {name: a100, gpu: A100-80-SXM, gpus_per_node: 8}
  - {name: h100, gpu: H100-SXM, gpus_per_node: 8, nodes: 2}
  - {name: cpu, gpu: cpu, gpus_per_node: 1, memory_gib_per_gpu: 6,
     kv_cache_gib_per_gpu: 1}
"""
HOST_OF = {"small": "r1", "chat": "a1", "large": "h2", "nano": "c1"}


def nodes(cluster: Cluster) -> list[dict[str, Any]]:
    said = cluster.lab.run("head", f"RAY_AUTH_MODE=token {PYTHON} nodes.py", timeout_s=40)
    answer = next(line for line in said.splitlines() if line.startswith("[{"))  # Ray talks too
    found: list[dict[str, Any]] = json.loads(answer)
    return sorted(found, key=lambda node: node["host"])


def told(what: str, since_s: float) -> None:
    print(f"{what}: {time.monotonic() - since_s:.1f} s")  # noqa: T201 - figures of the report


def test_ray_up_starts_every_pool_and_passes_over_a_host_that_is_down(cluster: Cluster):
    started_s = time.monotonic()
    (cluster.lab.hosts["head"].folder / "root" / "nodes.py").write_text(NODES)

    cluster.ray("up")

    told("ray up", started_s)
    eventually(lambda: len(nodes(cluster)) == 5, 90, 1.0)
    told("five nodes", started_s)
    assert [(node["host"], node["pool"], node["gpus"]) for node in nodes(cluster)] == [
        ("a1", "a100", 8),
        ("c1", "cpu", 0),
        ("h2", "h100", 8),
        ("head", "", 0),
        ("r1", "rtx4090", 4),
    ]


def test_a_second_ray_up_changes_nothing(cluster: Cluster):
    before, started_s = nodes(cluster), time.monotonic()

    said = cluster.ray("up")

    told("second ray up", started_s)
    assert "Ray runs here as it should: nothing changed" in said
    time.sleep(5)  # several rounds of the autoscaler
    assert nodes(cluster) == before


def test_ray_wants_the_token(cluster: Cluster):
    shell = f"RAY_AUTH_MODE=disabled timeout 8 {PYTHON} nodes.py && echo let in || echo kept out"

    assert "kept out" in cluster.lab.run("head", shell, timeout_s=30)


def test_a_mixed_fleet_runs_on_its_pools(cluster: Cluster):
    home = cluster.lab.hosts["head"].folder / "root"
    (home / "fleet.yaml").write_text(textwrap.dedent(FLEET))
    started_s = time.monotonic()

    cluster.bora(f"deploy ~/fleet.yaml --address {cluster.lab.address('head')}:6379", timeout_s=300)

    told("bora deploy", started_s)
    status = json.loads(cluster.bora("status --json"))
    where = {
        variant["model"]: {replica["node"] for replica in variant["replicas"]}
        for variant in status["variants"]
    }
    assert where == {model: {host} for model, host in HOST_OF.items()}
    assert len(status["gateways"]) == 2


@pytest.mark.parametrize("model", HOST_OF)
def test_gateways_on_two_hosts_answer(cluster: Cluster, model: str):
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 4, "temperature": 0})
    answers = set()
    for host in ("head", "r1"):  # the head, and then by address
        url = f"http://{cluster.lab.address(host)}:8000/v1/completions"
        asked = f"curl -sS --fail -m 20 -H 'content-type: application/json' -d '{body}' {url}"
        answers.add(json.loads(cluster.lab.run(OPERATOR, asked))["choices"][0]["text"])

    assert len(answers) == 1


def test_a_host_that_is_stopped_lets_its_streams_finish(cluster: Cluster):
    stream(cluster, "small", to="small.stream")
    started_s = time.monotonic()

    stop = f"cd bora && {PYTHON} -m cluster.ray_node stop --cluster lab --drain-s 30"
    cluster.lab.run("r1", stop)

    told("a host drained and stopped", started_s)
    assert cluster.lab.run(OPERATOR, "tail -n 2 small.stream").strip() == "data: [DONE]"


def test_a_host_that_dies_is_replaced_by_another_of_its_pool(cluster: Cluster):
    cluster.lab.boot("h1")

    cluster.lab.power_off("h2")

    started_s = time.monotonic()
    eventually(lambda: ("h1", "h100") in pools(cluster), 120, 1.0)
    told("another host of the pool", started_s)
    eventually(lambda: serving(cluster, "large") == {"h1"}, 120, 1.0)
    told("the model on it", started_s)


def pools(cluster: Cluster) -> set[tuple[str, str]]:
    return {(node["host"], node["pool"]) for node in nodes(cluster)}


def serving(cluster: Cluster, model: str) -> set[str]:
    variants = json.loads(cluster.bora("status --json"))["variants"]
    replicas = next(v["replicas"] for v in variants if v["model"] == model)
    return {replica["node"] for replica in replicas if replica["state"] == "ready"}


def stream(cluster: Cluster, model: str, *, to: str) -> None:
    """Begin a stream of a few seconds, which ends up in the operator's file `to`."""
    body = json.dumps(
        {"model": model, "prompt": "Hi", "max_tokens": 300, "stream": True, "ignore_eos": True}
    )
    url = f"http://{cluster.lab.address('head')}:8000/v1/completions"
    asked = f"curl -sSN -m 60 -H 'content-type: application/json' -d '{body}' {url} > {to}"
    cluster.lab.run(OPERATOR, f"({asked}) > /dev/null 2>&1 &")
    eventually(lambda: "data:" in cluster.lab.run(OPERATOR, f"cat {to}"), 10)


def test_a_host_is_started_when_replicas_ask_for_one(cluster: Cluster):
    """The inventory names two hosts of the pool, of which one runs and is full."""
    cluster.lab.boot("h2")
    home = cluster.lab.hosts["head"].folder / "root"
    (home / "inventory.yaml").write_text(INVENTORY)
    fleet = textwrap.dedent(FLEET).replace(
        "[h100], tensor", "[h100], replicas: {min: 2, max: 2}, tensor"
    )
    (home / "fleet.yaml").write_text(fleet)
    started_s = time.monotonic()

    cluster.bora("deploy ~/fleet.yaml --inventory ~/inventory.yaml")

    told("bora deploy, with a host started for it", started_s)
    assert serving(cluster, "large") == {"h1", "h2"}


def test_ray_down_lets_streams_finish_and_leaves_no_process(cluster: Cluster):
    stream(cluster, "chat", to="chat.stream")
    started_s = time.monotonic()

    said = cluster.ray("down")

    told("ray down", started_s)
    assert "No nodes remaining" in said
    assert cluster.lab.run(OPERATOR, "tail -n 2 chat.stream").strip() == "data: [DONE]"
    for host in ("head", "r1", "a1", "h1", "h2", "c1"):
        assert cluster.lab.processes(host) == []
