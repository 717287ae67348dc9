"""The README, line by line: `bora up` with real vLLM answers over HTTP and gRPC, and survives."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import psutil
import pytest

from tests.system.harness import PATIENCE_S, Bora, eventually

pytestmark = pytest.mark.system
MODELS = ["nano-large-3", "nano-mixtral"]
ROOT = Path(__file__).resolve().parent.parent.parent
GRPC_CLIENT = """
import json, sys
import grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
import inference_pb2 as pb2
import inference_pb2_grpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = inference_pb2_grpc.InferenceStub(channel)
    request = pb2.ChatCompletionRequest(
        model="nano-mixtral",
        messages=[pb2.ChatMessage(role="user", content="Hello")],
        max_tokens=8,
        temperature=0,
    )
    answer = stub.ChatCompletion(request, timeout=180)
    chunks = list(stub.ChatCompletionStream(request, timeout=180))
    models = stub.ListModels(pb2.ListModelsRequest(), timeout=180)
    print(json.dumps({
        "services": list(ProtoReflectionDescriptorDatabase(channel).get_services()),
        "tokens": answer.usage.completion_tokens,
        "whole": answer.choices[0].message.content,
        "streamed": "".join(c.choices[0].delta.content for c in chunks if c.choices),
        "models": [model.id for model in models.data],
    }))
"""
HELLO = [{"role": "user", "content": "Say hello."}]


def client_of(bora: Bora, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{bora.url}/v1", api_key="none", max_retries=0, **options)


@pytest.mark.parametrize("model", MODELS)
def test_chat_answers(local: Bora, model: str):
    answer = client_of(local).chat.completions.create(model=model, messages=HELLO, max_tokens=12)

    assert answer.model == model
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_says_what_the_whole_answer_says(local: Bora, model: str):
    client = client_of(local)
    request = {"model": model, "prompt": "One two three", "max_tokens": 24, "temperature": 0}

    whole = client.completions.create(**request).choices[0].text
    parts = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]

    assert "".join(parts) == whole
    assert len(parts) > 10


def test_curl_gets_the_models(local: Bora):
    curl = ["curl", "-sS", "--fail", f"{local.url}/v1/models"]
    result = subprocess.run(curl, capture_output=True, text=True, check=True)

    assert sorted(model["id"] for model in json.loads(result.stdout)["data"]) == MODELS


def test_grpc_answers_a_client_made_from_the_shipped_proto(local: Bora, tmp_path: Path):
    """In a process of its own, with code generated now: as a user of the .proto file would."""
    shutil.copy(ROOT / "gateway" / "proto" / "inference.proto", tmp_path / "inference.proto")
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I."]
    protoc += ["--python_out=.", "--grpc_python_out=.", "inference.proto"]
    subprocess.run(protoc, cwd=tmp_path, check=True)
    (tmp_path / "client.py").write_text(GRPC_CLIENT)

    command = [sys.executable, "client.py", f"127.0.0.1:{local.grpc_port}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert {"bora.v1.Inference", "grpc.health.v1.Health"} <= set(said["services"])
    assert said["tokens"] == 8
    assert said["streamed"] == said["whole"]
    assert sorted(said["models"]) == MODELS


def test_planned_kv_cache_is_what_the_engines_have(local: Bora):
    variants = local.status()["variants"]

    assert sorted(variant["model"] for variant in variants) == MODELS
    for variant in variants:
        assert variant["replicas"], variant["variant"]
        for replica in variant["replicas"]:
            assert replica["kv_cache_tokens"] == variant["planned_kv_cache_tokens"]


def test_an_overlong_prompt_is_the_engines_400(local: Bora):
    with pytest.raises(openai.BadRequestError, match="context length"):
        client_of(local).completions.create(
            model="nano-mixtral", prompt="word " * 20_000, max_tokens=4
        )


def test_an_unknown_model_is_a_404_that_names_the_nearest(local: Bora):
    with pytest.raises(openai.NotFoundError, match="nano-mixtral"):
        client_of(local).chat.completions.create(model="nano-mixtrall", messages=HELLO)


def test_locust_finds_no_failure(local: Bora):
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py")]
    command += ["--headless", "-u", "16", "-r", "4", "-t", "30s", "--host", local.url, "--json"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=ROOT
    )

    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    rows = json.loads(result.stdout)
    assert sum(row["num_requests"] for row in rows) > 20
    assert sum(row["num_failures"] for row in rows) == 0
    assert {"TTFT", "ITL"} <= {row["method"] for row in rows}


def test_logs_show_the_engine(local: Bora):
    result = local.command("logs", "nano-mixtral", "-n", "500")

    assert re.search(r"KV cache size: [\d,]+ tokens", result.stdout)
    assert local.command("logs", "nano-mixtrall").returncode == 2


def test_a_killed_engine_is_replaced_and_nothing_else_restarts(local: Bora):
    """`kill -9` of vLLM's server process during traffic."""
    before = local.status()
    pids = {v["model"]: v["replicas"][0]["pid"] for v in before["variants"]}
    [engine] = psutil.Process(pids["nano-mixtral"]).children()
    traffic = _Traffic(local, "nano-mixtral")

    os.kill(engine.pid, signal.SIGKILL)
    killed_s = time.monotonic()

    def ready(model: str) -> set[int]:
        replicas = local.variant(model)["replicas"]
        return {each["pid"] for each in replicas if each["state"] == "ready"}

    eventually(lambda: ready("nano-mixtral") - {pids["nano-mixtral"]})
    eventually(lambda: traffic.last_success_s > killed_s)
    traffic.stop()
    assert ready("nano-large-3") == {pids["nano-large-3"]}
    assert len(ready("nano-mixtral")) == 1
    assert traffic.hung == 0


def test_down_leaves_no_process(local: Bora):
    assert len(local.processes()) > 5

    result = local.command("down")

    assert result.returncode == 0, result.stderr
    assert local.ended() == 0
    assert local.processes() == []
    assert local.command("status").returncode == 4


class _Traffic(threading.Thread):
    """One request after the other; each has an end within its own deadline."""

    def __init__(self, bora: Bora, model: str) -> None:
        super().__init__(daemon=True)
        self._client = client_of(bora, timeout=75)
        self._model = model
        self._stop_now = threading.Event()
        self.last_success_s = 0.0
        self.hung = 0
        self.start()

    def run(self) -> None:
        while not self._stop_now.is_set():
            try:
                self._client.completions.create(model=self._model, prompt="Hi", max_tokens=8)
                self.last_success_s = time.monotonic()
            except openai.APITimeoutError:
                self.hung += 1
            except openai.APIError:
                time.sleep(0.2)

    def stop(self) -> None:
        self._stop_now.set()
        self.join(80)
