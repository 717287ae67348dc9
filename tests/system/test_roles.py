"""A model whose prompts one replica reads and whose answers another writes, from fleet to stream."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.system.harness import PATIENCE_S, Bora, eventually, running_bora

pytestmark = pytest.mark.ray

FLEET = """
fleet: roles
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    disaggregate: always
    max_model_len: 16384
    max_num_seqs: 32
    replicas: {min: 1, max: 4}
    demand: {requests_per_s: 4, input_tokens: {mean: 3000}, output_tokens: {mean: 200}}
"""


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bora]:
    folder = tmp_path_factory.mktemp("roles")
    (folder / "fleet.yaml").write_text(FLEET)
    with running_bora(folder / "state", str(folder / "fleet.yaml")) as bora:
        bora.wait_ready()
        yield bora


def replicas(bora: Bora, role: str) -> list[str]:
    """Those of a role that are ready."""
    [variant] = [each for each in bora.status()["variants"] if each["role"] == role]
    return [each["replica"] for each in variant["replicas"] if each["state"] == "ready"]


def answer(bora: Bora, prompt: str) -> tuple[dict[str, str], str]:
    """Headers and text."""
    body = {"model": "chat", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{bora.url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as said:
        found: dict[str, Any] = json.load(said)
        return dict(said.headers), found["choices"][0]["text"]


def alive(bora: Bora) -> set[str]:
    """Endpoints that the gateway knows and has found well."""
    with urllib.request.urlopen(f"{bora.url}/metrics", timeout=PATIENCE_S) as page:
        families = text_string_to_metric_families(page.read().decode())
    samples = (each for family in families for each in family.samples)
    found = (each for each in samples if each.name == "bora_gateway_endpoint_alive" and each.value)
    return {each.labels["endpoint"] for each in found}


def test_a_long_prompt_is_read_by_one_replica_and_answered_by_another(roles: Bora):
    [reader], [writer] = replicas(roles, "prefill"), replicas(roles, "decode")

    eventually(lambda: {reader, writer} <= alive(roles))  # the controller hears of them before

    headers, _ = answer(roles, "word " * 4000)

    assert headers["x-bora-prefill-endpoint"] == reader
    assert headers["x-bora-endpoint"] == writer
    assert "x-bora-prefill-endpoint" not in answer(roles, "Hello")[0]


def test_readers_are_scaled_beside_those_that_answer(roles: Bora):
    before = answer(roles, "again " * 4000)[1]

    assert roles.command("scale", "chat", "2").returncode == 0

    for role in ("decode", "prefill"):
        eventually(lambda role=role: len(replicas(roles, role)) == 2)
    assert answer(roles, "again " * 4000)[1] == before
