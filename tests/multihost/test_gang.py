"""One real vLLM engine on two hosts: the same answers as on one, and it lives and dies as a whole."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.debian_packages import install_missing
from tests.multihost.conftest import ROOT
from tests.multihost.lab import Lab, running_lab
from tests.system.harness import eventually

pytestmark = pytest.mark.multihost
PROMPTS = ["The bora blows", "def fibonacci(n):", "Once upon a time, in a city by the sea,"]
POOLS = {"head": "solo", "c1": "pair", "c2": "pair"}
FLEET = """
fleet: gang
models:
  - {name: two, model: nano-7b, dtype: float32, max_model_len: 2048, max_num_seqs: 8,
     nodes_per_replica: 2, tensor_parallel_size: 2, pools: [pair]}
  - {name: one, model: nano-7b, dtype: float32, max_model_len: 2048, max_num_seqs: 8,
     tensor_parallel_size: 1, pools: [solo]}
gateway: {http_port: 8000, grpc_port: 8001}
"""
ASK = """
import json, sys, urllib.request
model, prompts = json.loads(sys.argv[1])
for prompt in prompts:
    body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        "http://127.0.0.1:8000/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        print(json.dumps(json.load(response)["choices"][0]["text"]))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three hosts with Ray and one slot each; the fleet is deployed."""
    if os.geteuid() != 0:
        pytest.fail("hosts with their own networks need root: sudo make test-multihost")
    install_missing()
    with running_lab(*POOLS, shown=[ROOT]) as lab:
        for name in POOLS:
            home = lab.hosts[name].folder / "root"
            (home / ".profile").write_text(
                f"export PATH={sys.prefix}/bin:$PATH PYTHONPATH={ROOT} "
                "PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled\n"
            )
            start_ray(lab, name)
        home = lab.hosts["head"].folder / "root"
        (home / "fleet.yaml").write_text(FLEET)
        (home / "ask.py").write_text(ASK)
        bora(lab, f"deploy fleet.yaml --address {lab.address('head')}:6379", timeout_s=900)
        yield lab


def start_ray(lab: Lab, name: str) -> None:
    head = lab.address("head")
    alone = "--head --port 6379 --include-dashboard false"
    where = alone if name == "head" else f"--address {head}:6379"
    labels = f"bora.pool={POOLS[name]},bora.gpu=cpu,bora.memory-gib=6,bora.kv-cache-gib=1"
    command = f"python -m ray.scripts.scripts start {where} --node-ip-address {lab.address(name)}"
    command += " --num-cpus 2 --num-gpus 0 --object-store-memory 100000000 --disable-usage-stats"
    command += f" --labels {labels} --resources '{{\"bora_slot\": 1}}'"
    lab.run(name, f"{command} >ray.log 2>&1 || (cat ray.log; exit 1)", timeout_s=90)


def bora(lab: Lab, arguments: str, timeout_s: float = 60.0) -> str:
    return lab.run("head", f"python -m cluster {arguments}", timeout_s=timeout_s)


def the_replica(lab: Lab, model: str) -> dict[str, Any]:
    variants = json.loads(bora(lab, "status --json"))["variants"]
    [variant] = [each for each in variants if each["model"] == model]
    ready = [each for each in variant["replicas"] if each["state"] == "ready"]
    return dict(ready[0]) if ready else {}


def answers(lab: Lab, model: str) -> list[str]:
    question = json.dumps([model, PROMPTS])
    said = lab.run("head", f"python ask.py '{question}'", timeout_s=900)
    return [json.loads(line) for line in said.splitlines()]


def pids(lab: Lab, host: str, words: str) -> list[int]:
    lines = [line for line in lab.processes(host) if words in line and "guard.py" not in line]
    return [int(line.split()[0]) for line in lines]


def test_two_ranks_on_two_hosts_answer_as_one_rank_does(lab: Lab):
    replica = eventually(lambda: the_replica(lab, "two"), 600, 3.0)
    eventually(lambda: the_replica(lab, "one"), 120, 3.0)

    assert {replica["node"], replica["followers"][0]["node"]} == {"c1", "c2"}
    assert pids(lab, replica["followers"][0]["node"], "vllm_follower")
    assert not pids(lab, replica["node"], "vllm_follower")
    assert answers(lab, "two") == answers(lab, "one")


def test_the_ranks_talk_by_the_interface_between_the_hosts(lab: Lab):
    replica = the_replica(lab, "two")
    [pid] = pids(lab, replica["followers"][0]["node"], "vllm_follower")

    said = lab.run(replica["followers"][0]["node"], f"tr '\\0' '\\n' </proc/{pid}/environ")

    assert "GLOO_SOCKET_IFNAME=eth0" in said
    assert "NCCL_SOCKET_IFNAME==eth0" in said


def test_when_a_rank_dies_the_whole_gang_starts_anew_and_answers_the_same(lab: Lab):
    before, expected = the_replica(lab, "two"), answers(lab, "one")
    follower = before["followers"][0]["node"]
    [pid] = pids(lab, follower, "vllm_follower")
    leaders = pids(lab, before["node"], "api_server")

    lab.run(follower, f"kill -9 {pid}")
    killed_s = time.monotonic()
    eventually(lambda: not the_replica(lab, "two"), 20, 0.3)
    print(f"out of service: {time.monotonic() - killed_s:.1f} s")  # noqa: T201 - of the report
    eventually(lambda: the_replica(lab, "two"), 600, 3.0)
    print(f"serving again: {time.monotonic() - killed_s:.1f} s")  # noqa: T201

    assert the_replica(lab, "two")["replica"] != before["replica"]
    assert not set(leaders) & set(pids(lab, before["node"], "api_server"))
    assert answers(lab, "two") == expected
    died = [
        event["reason"]
        for event in json.loads(bora(lab, "status --json"))["events"]
        if event["kind"] == "replica-died"
    ]
    assert any(f"rank 1 on {follower} ended with status" in reason for reason in died), died
