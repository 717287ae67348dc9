"""Keys, limits and usage of a whole fleet, with simulated engines on a real Ray."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.system.harness import PATIENCE_S, eventually, running_bora

pytestmark = pytest.mark.ray

FLEET = """
fleet: locked
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
gateway: {auth: keys}
"""


def status_of(url: str, key: str | None) -> int:
    body = {"model": "chat", "prompt": "Tell me", "max_tokens": 8, "ignore_eos": True}
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{url}/v1/completions", data=json.dumps(body).encode(), headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_fleet_asks_for_keys_and_counts_what_they_use(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET)
    with running_bora(tmp_path / "state", str(fleet)) as bora:
        bora.wait_ready()
        assert status_of(bora.url, None) == 401

        made = json.loads(bora.command("keys", "create", "acme", "--rpm", "3", "--json").stdout)
        eventually(lambda: status_of(bora.url, made["key"]) == 200)
        statuses = [status_of(bora.url, made["key"]) for _ in range(3)]
        assert set(statuses) == {200, 429}

        def requests() -> int:
            used = json.loads(bora.command("usage", "--by", "tenant", "--json").stdout)["rows"]
            return sum(row["requests"] for row in used)

        eventually(lambda: requests() == 1 + statuses.count(200))
        bora.command("keys", "revoke", "acme")
        eventually(lambda: status_of(bora.url, made["key"]) == 401)
    assert (tmp_path / "state" / "keys.yaml").stat().st_mode & 0o777 == 0o600
