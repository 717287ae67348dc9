"""vLLM serves a model that a hub has, from the cache of its node."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from cluster import nano
from tests.cluster.fake_hub import running_hub
from tests.system.harness import running_bora

pytestmark = pytest.mark.system

REPO = "someone/nano-7b"
FLEET = f"""
fleet: hub
models:
  - name: chat
    model: {REPO}
    dtype: float32
    max_model_len: 1024
    max_num_seqs: 2
"""


def test_vllm_answers_with_weights_that_were_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = {path.name: path.read_bytes() for path in nano.ensure("nano-7b").iterdir()}
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET)
    with running_hub() as hub:
        hub.publish(REPO, {**files, "consolidated.safetensors": files["model.safetensors"] + b"!"})
        hub.bytes_per_s = 10e6
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        with running_bora(tmp_path / "state", str(fleet)) as bora:
            bora.wait_ready(300)
            body = json.dumps({"model": "chat", "prompt": "One two", "max_tokens": 8}).encode()
            request = urllib.request.Request(
                f"{bora.url}/v1/completions", body, {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
            said = bora.said()

    assert answer["usage"]["completion_tokens"] == 8
    assert said.index("downloading weights, 0 % of 17.1 MiB") < said.index(
        "chat: starting the engine"
    )
    assert sorted({path for path, _ in hub.starts}) == sorted(files)
