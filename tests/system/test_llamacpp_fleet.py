"""`bora up` with llama.cpp: it answers, and comes back when its engine is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from cluster import nano
from placement.catalogue import CONFIGS
from tests.system.harness import PATIENCE_S, Bora, eventually, running_bora

pytestmark = pytest.mark.system
MODELS = ["nano-7b", "nano-mixtral"]
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bora]:
    state = tmp_path_factory.mktemp("llamacpp") / "state"
    with running_bora(state, str(CONFIGS / "fleets" / "llamacpp.yaml")) as bora:
        bora.wait_ready()
        yield bora


def client_of(bora: Bora) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{bora.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )


@pytest.mark.parametrize("model", MODELS)
def test_chat_and_completions_answer(fleet: Bora, model: str):
    client = client_of(fleet)
    request = {"model": model, "prompt": "One two three", "max_tokens": 24, "temperature": 0}

    chat = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12)
    whole = client.completions.create(**request).choices[0].text
    chunks = list(client.completions.create(**request, stream=True))

    assert (chat.model, chat.usage.completion_tokens) == (model, 12)
    streamed = "".join(chunk.choices[0].text for chunk in chunks)
    assert streamed == whole.rstrip("\N{REPLACEMENT CHARACTER}")  # half a letter is not streamed
    assert len(chunks) > 10


def test_planned_memory_is_what_the_engines_have(fleet: Bora):
    variants = fleet.status()["variants"]

    assert sorted(variant["model"] for variant in variants) == MODELS
    for variant in variants:
        [replica] = variant["replicas"]
        assert variant["engine"] == "llamacpp"
        assert replica["kv_cache_tokens"] == variant["planned_kv_cache_tokens"]
        assert replica["weights_bytes"] == pytest.approx(variant["planned_weights_bytes"], rel=0.01)


def test_logs_show_the_engine(fleet: Bora):
    assert "llama_kv_cache" in fleet.command("logs", "nano-7b", "-n", "500").stdout


def test_a_killed_engine_is_replaced_and_nothing_else_restarts(fleet: Bora):
    before = {v["model"]: v["replicas"][0]["pid"] for v in fleet.status()["variants"]}
    [engine] = psutil.Process(before["nano-mixtral"]).children()

    os.kill(engine.pid, signal.SIGKILL)

    def replaced() -> bool:
        replicas = fleet.variant("nano-mixtral")["replicas"]
        return any(r["pid"] != before["nano-mixtral"] and r["state"] == "ready" for r in replicas)

    eventually(replaced)
    answer = client_of(fleet).completions.create(model="nano-mixtral", prompt="Hi", max_tokens=4)
    assert answer.usage.completion_tokens == 4
    after = {v["model"]: v["replicas"][0]["pid"] for v in fleet.status()["variants"]}
    assert after["nano-7b"] == before["nano-7b"]


def test_down_leaves_no_process(fleet: Bora):
    assert len(fleet.processes()) > 5

    assert fleet.command("down").returncode == 0

    assert fleet.ended() == 0
    assert fleet.processes() == []


def test_a_gguf_file_is_served_by_its_path(tmp_path: Path):
    file = tmp_path / "mine.gguf"
    file.write_bytes(nano.ensure_gguf("nano-7b", "q8_0").read_bytes())

    with running_bora(tmp_path / "state", "--model", str(file)) as bora:
        bora.wait_ready()

        answer = client_of(bora).completions.create(model="mine", prompt="Hi", max_tokens=4)
        assert answer.usage.completion_tokens == 4
        [replica] = bora.variant("mine")["replicas"]
        assert replica["weights_bytes"] == pytest.approx(
            bora.variant("mine")["planned_weights_bytes"], rel=0.001
        )
