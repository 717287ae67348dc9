"""LoRA adapters from a fleet's YAML to an answer: they come, go and fail while engines run on."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoints import locate
from cluster.engines.vllm import VllmEngine
from cluster.errors import ClusterError
from cluster.processes import start_guarded, stop_guarded, tail
from loadtests.drill_processes import free_ports
from placement.plan import Plan, Variant
from tests.cluster.fake_hub import Hub, running_hub
from tests.lora_files import an_adapter
from tests.system.harness import PATIENCE_S, Bora, eventually, running_bora

PROMPT = "The bora blows"
REPO = "acme/legal-lora"
SIM_FLEET = """
fleet: adapted
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
    max_num_seqs: 16
    replicas: {min: 2, max: 2}
    lora: {max_loras: 4, max_lora_rank: 16}
    adapters: ADAPTERS
"""
VLLM_FLEET = """
fleet: adapted
models:
  - name: chat
    model: nano-7b
    dtype: float32
    max_model_len: 4096
    max_num_seqs: 8
    lora: {max_loras: 2, max_lora_rank: 16}
    adapters: ADAPTERS
"""


def a_fleet(folder: Path, form: str, adapters: Mapping[str, object]) -> str:
    path = folder / f"fleet-{time.monotonic_ns()}.yaml"
    named = {name: str(source) for name, source in adapters.items()}
    path.write_text(form.replace("ADAPTERS", json.dumps(named)))
    return str(path)


def ask(url: str, model: str, *, key: str = "none") -> tuple[int, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def text_of(url: str, model: str, **options: str) -> str:
    status, answer = ask(url, model, **options)
    assert status == 200, answer
    assert answer["model"] == model
    return str(answer["choices"][0]["text"])


def cards(bora: Bora) -> dict[str, Any]:
    with urllib.request.urlopen(f"{bora.url}/v1/models", timeout=PATIENCE_S) as response:
        return {card["id"]: card for card in json.loads(response.read())["data"]}


def pids(bora: Bora) -> set[int]:
    replicas = bora.variant("chat")["replicas"]
    return {replica["pid"] for replica in replicas if replica["state"] == "ready"}


def loaded(bora: Bora, name: str) -> int:
    """On how many endpoints the gateway can ask for it."""
    return int(cards(bora).get(name, {"ready_endpoints": -1})["ready_endpoints"])


def deploy(bora: Bora, fleet: str) -> None:
    result = bora.command("deploy", fleet)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def bora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bora]:
    folder = tmp_path_factory.mktemp("adapted")
    sources = {"legal": an_adapter(folder / "legal", seed=1, num_layers=1)}
    with running_bora(folder / "state", a_fleet(folder, SIM_FLEET, sources)) as bora:
        bora.wait_ready()
        yield bora


@pytest.mark.ray
def test_an_adapter_of_the_fleet_answers_from_the_start(bora: Bora) -> None:
    eventually(lambda: loaded(bora, "legal") == 2)

    assert text_of(bora.url, "legal") != text_of(bora.url, "chat")
    assert cards(bora)["legal"]["parent"] == "chat"


@pytest.mark.ray
def test_adapters_come_and_go_while_the_engines_run_on(bora: Bora, tmp_path: Path) -> None:
    before = pids(bora)
    sources = {
        "medical": an_adapter(tmp_path / "medical", seed=2, num_layers=1, rank=4),
        "wide": an_adapter(tmp_path / "wide", seed=3, num_layers=1, rank=64),
        "missing": "/no/such/folder",
    }
    deploy(bora, a_fleet(tmp_path, SIM_FLEET, sources))
    eventually(lambda: loaded(bora, "medical") == 2)

    assert text_of(bora.url, "medical") != text_of(bora.url, "chat")
    status, refused = ask(bora.url, "legal")
    assert (status, refused["error"]["code"]) == (404, "model_not_found")
    assert pids(bora) == before
    assert loaded(bora, "wide") == loaded(bora, "missing") == 0
    failures = [each["adapter_failures"] for each in bora.variant("chat")["replicas"]]
    assert failures == 2 * [
        {
            "wide": "Call to add_lora method failed: LoRA rank 64 is greater than max_lora_rank 16.",
            "missing": "/no/such/folder: no such folder on this node",
        }
    ]
    events = [event for event in bora.status()["events"] if event["kind"] == "adapter"]
    assert any("wide not loaded" in event["text"] for event in events)
    assert any("rank 64" in event["reason"] for event in events)


@pytest.mark.ray
def test_an_adapter_that_failed_is_loaded_once_its_files_are_there(
    bora: Bora, tmp_path: Path
) -> None:
    late = tmp_path / "late"
    deploy(bora, a_fleet(tmp_path, SIM_FLEET, {"late": late}))
    eventually(lambda: "late" in cards(bora))
    assert loaded(bora, "late") == 0
    an_adapter(late, seed=4, num_layers=1)

    eventually(lambda: loaded(bora, "late") == 2)


@pytest.mark.ray
def test_a_replica_that_died_has_its_adapters_again(bora: Bora, tmp_path: Path) -> None:
    deploy(
        bora,
        a_fleet(tmp_path, SIM_FLEET, {"legal": an_adapter(tmp_path / "l", seed=1, num_layers=1)}),
    )
    eventually(lambda: loaded(bora, "legal") == 2)
    before = pids(bora)
    os.kill(min(before), signal.SIGKILL)
    eventually(lambda: pids(bora) != before and len(pids(bora)) == 2)

    eventually(lambda: loaded(bora, "legal") == 2)
    for _ in range(8):
        assert ask(bora.url, "legal")[0] == 200


@pytest.fixture
def adapted_hub(tmp_path: Path) -> Iterator[Hub]:
    """It holds one adapter, and sends it slowly."""
    folder = an_adapter(tmp_path / "hub" / "legal", seed=5)
    with running_hub() as hub:
        hub.publish(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
        hub.bytes_per_s = 3e5
        yield hub


@pytest.mark.ray
def test_an_adapter_of_a_hub_is_downloaded_once_for_all_replicas_and_told_of(
    adapted_hub: Hub, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", adapted_hub.url)
        environment.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        fleet = a_fleet(tmp_path, SIM_FLEET, {"legal": REPO})
        with running_bora(tmp_path / "state", fleet) as bora:
            stages = [
                stage
                for each in eventually(lambda: adapter_stages(bora))
                for stage in each["adapter_stages"].values()
            ]
            bora.wait_ready()
            eventually(lambda: loaded(bora, "legal") == 2)

            [variant] = bora.status()["variants"]
            events = [event["text"] for event in bora.status()["events"]]
    assert variant["adapters"]["legal"].startswith(f"{REPO}@")
    assert stages[0].startswith(("downloading weights, ", "waiting for another replica's download"))
    assert sum("downloading adapter legal, " in text for text in events) == 1
    assert len([path for path, start in adapted_hub.starts if path.endswith(".safetensors")]) == 1


def adapter_stages(bora: Bora) -> list[dict[str, Any]]:
    try:
        replicas: list[dict[str, Any]] = bora.variant("chat")["replicas"]
    except (ClusterError, OSError, StopIteration, ValueError):
        return []  # it is still starting
    return [each for each in replicas if each["adapter_stages"]]


def of_vllm_itself(variant: Variant, adapter: Path, log: Path) -> str:
    """What vLLM answers with the adapter that it was started with."""
    [port] = free_ports(1)
    launch = VllmEngine().launch(
        variant, checkpoint=locate(variant), host="127.0.0.1", port=port, api_key="secret"
    )
    command = (*launch.command, "--lora-modules", f"legal={adapter}")
    process = start_guarded(command, log=log, env=launch.env, grace_s=5.0)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: process.poll() is not None or is_healthy(url), period_s=1.0)
        assert process.poll() is None, tail(log, 30)
        return text_of(url, "legal", key="secret")
    finally:
        stop_guarded(process)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.system
def test_real_engines_answer_with_an_adapter_as_vllm_itself_would(tmp_path: Path) -> None:
    legal = an_adapter(tmp_path / "legal", seed=1)
    with running_bora(tmp_path / "state", a_fleet(tmp_path, VLLM_FLEET, {})) as bora:
        bora.wait_ready()
        before = pids(bora)
        deploy(bora, a_fleet(tmp_path, VLLM_FLEET, {"legal": legal}))
        eventually(lambda: loaded(bora, "legal") == 1)
        of_model, of_adapter = text_of(bora.url, "chat"), text_of(bora.url, "legal")
        same_engine = pids(bora) == before
        deploy(bora, a_fleet(tmp_path, VLLM_FLEET, {}))
        gone, _ = ask(bora.url, "legal")
        plan = Plan.model_validate_json(
            bora.command("plan", a_fleet(tmp_path, VLLM_FLEET, {}), "--json").stdout
        )

    assert of_adapter != of_model
    assert same_engine
    assert gone == 404
    assert of_adapter == of_vllm_itself(plan.variants[0], legal, tmp_path / "vllm.log")
