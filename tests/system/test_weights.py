"""Weights that come from a hub: simulated engines on a real Ray fetch what real ones would."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster import nano
from tests.cluster.fake_hub import Fault, Hub, running_hub
from tests.system.harness import Bora, eventually, running_bora

pytestmark = pytest.mark.ray

REPO = "someone/nano-7b"
WEIGHTS = "model.safetensors"
FLEET = f"""
fleet: hub
models:
  - name: chat
    model: {REPO}
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 2048
    max_num_seqs: 8
    replicas: {{min: 1, max: 2}}
    engine_args: [--sim-fetch-weights]
    scaling: {{scale_down_delay_s: 600}}
model_cache: {{max_gib: 0.04, keep_free_gib: 0}}  # of two versions of 17 MiB
"""


def version(number: int) -> dict[str, bytes]:
    """Files of a checkpoint; those of another number differ in their last byte."""
    files = {path.name: path.read_bytes() for path in nano.ensure("nano-7b").iterdir()}
    return {**files, WEIGHTS: files[WEIGHTS][:-1] + bytes([number])}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.publish(REPO, version(1))
        hub.bytes_per_s = 5e6
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node") / "hub"


@pytest.fixture(scope="module")
def fleet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fleets") / "hub.yaml"
    path.write_text(FLEET)
    return path


@pytest.fixture(scope="module")
def bora(
    tmp_path_factory: pytest.TempPathFactory, hub: Hub, cache: Path, fleet_file: Path
) -> Iterator[Bora]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", hub.url)
        environment.setenv("HF_HUB_CACHE", str(cache))
        with running_bora(tmp_path_factory.mktemp("weights") / "state", str(fleet_file)) as bora:
            bora.wait_ready(180)
            yield bora


def events(bora: Bora) -> list[str]:
    return [event["text"] for event in bora.status()["events"] if event["kind"] == "weights"]


def ready(bora: Bora) -> int:
    return sum(
        replica["state"] == "ready"
        for variant in bora.status()["variants"]
        for replica in variant["replicas"]
    )


def commits(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("models--*/snapshots/*")}


def test_the_first_replica_downloads_and_everybody_sees_how_far_it_is(
    bora: Bora, hub: Hub, cache: Path
):
    told = [line for line in bora.said().splitlines() if "downloading weights, " in line]

    assert told[0].endswith("chat: downloading weights, 0 % of 17.1 MiB")
    assert len(told) > 1
    assert events(bora)[0].startswith("downloading 17.1 MiB of weights to ")
    assert ": done after " in events(bora)[1]
    assert commits(cache) == {hub.publish(REPO, version(1))}


def test_the_second_replica_of_the_node_downloads_nothing(bora: Bora, hub: Hub):
    hub.starts.clear()

    assert bora.command("scale", "chat", "2").returncode == 0
    eventually(lambda: ready(bora) == 2, 60)

    assert hub.starts == []
    assert len(events(bora)) == 2


def test_a_new_version_is_downloaded_before_the_old_one_goes(
    bora: Bora, hub: Hub, cache: Path, fleet_file: Path
):
    old = commits(cache)
    new = hub.publish(REPO, version(2))

    result = bora.command("deploy", str(fleet_file), timeout_s=180)

    assert result.returncode == 0, result.stderr
    assert "downloading weights, " in result.stderr
    assert commits(cache) == {*old, new}
    eventually(lambda: not rolling_out(bora), 60)


def test_a_download_that_is_killed_goes_on_where_it_ended_and_the_oldest_version_goes(
    bora: Bora, hub: Hub, cache: Path, fleet_file: Path
):
    """No room for a third: the first is used by nobody any more."""
    second = hub.publish(REPO, version(2))
    third = hub.publish(REPO, version(3))
    hub.starts.clear()
    with ThreadPoolExecutor() as pool:
        killed = pool.submit(bora.command, "deploy", str(fleet_file), timeout_s=180)
        pid = eventually(lambda: fetching(bora), 60)
        eventually(lambda: partial_bytes(cache) > 10**7, 60)
        os.kill(pid, signal.SIGKILL)
        assert killed.result().returncode == 5

    result = bora.command("deploy", str(fleet_file), timeout_s=180)

    assert result.returncode == 0, result.stderr
    assert [start for path, start in hub.starts if path == WEIGHTS][:2] == [0, 10 * 2**20]
    assert commits(cache) == {second, third}
    eventually(lambda: not rolling_out(bora), 60)


def rolling_out(bora: Bora) -> bool:
    variants: list[dict[str, Any]] = bora.status()["variants"]
    return len(variants) > 1 or any(variant["rollout"] for variant in variants)


def fetching(bora: Bora) -> int | None:
    for pid in bora.processes():
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
        if words[1:3] == [b"-m", b"cluster.fetch_weights"]:
            return pid
    return None


def partial_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("*/blobs/*.incomplete"))


def test_a_file_that_is_damaged_on_disk_is_fetched_again(bora: Bora, hub: Hub, cache: Path):
    [folder] = cache.glob(f"models--*/snapshots/{hub.publish(REPO, version(3))}")
    blob = (folder / WEIGHTS).resolve()
    damaged = blob.read_bytes()[:-1] + b"?"
    blob.write_bytes(damaged)
    hub.starts.clear()
    hub.bytes_per_s = None
    assert bora.command("scale", "chat", "1").returncode == 0
    eventually(lambda: ready(bora) == 1, 60)

    assert bora.command("scale", "chat", "2").returncode == 0
    eventually(lambda: ready(bora) == 2, 60)

    assert (folder / WEIGHTS).read_bytes() == version(3)[WEIGHTS]
    assert hub.starts == [(WEIGHTS, 0)]


def test_a_version_that_cannot_be_had_leaves_the_old_one_serving(
    bora: Bora, hub: Hub, fleet_file: Path
):
    hub.publish(REPO, version(5))
    hub.faults = [Fault(WEIGHTS, times=10**6, status=401)]

    result = bora.command("deploy", str(fleet_file), timeout_s=180)

    hub.faults.clear()
    assert result.returncode == 5
    assert "answers 401: give " in result.stderr
    assert "taken back" in result.stderr
    assert ready(bora) >= 1


def test_a_revision_that_is_not_there_is_found_before_anything_starts(bora: Bora, tmp_path: Path):
    missing = tmp_path / "fleet.yaml"
    missing.write_text(FLEET.replace("engine: sim", "engine: sim\n    revision: v9"))

    result = bora.command("deploy", str(missing))

    assert result.returncode == 2
    assert f"{REPO}@v9" in result.stderr


def test_without_room_for_both_versions_the_old_one_serves_while_the_new_one_comes(
    bora: Bora, hub: Hub, cache: Path, tmp_path: Path
):
    """As many replicas as the machine has slots: an old one goes only once the weights are there."""
    slots = json.loads(bora.command("plan", str(fleet_of(tmp_path, 1)), "--json").stdout)[
        "gpus_total"
    ]
    full = fleet_of(tmp_path, slots)
    assert bora.command("deploy", str(full), timeout_s=180).returncode == 0
    eventually(lambda: ready(bora) == slots and not rolling_out(bora), 60)
    fourth = hub.publish(REPO, version(4))
    hub.bytes_per_s = 2e6

    with ThreadPoolExecutor() as pool:
        deployed = pool.submit(bora.command, "deploy", str(full), timeout_s=300)
        seen: list[int] = []
        whole = cache / "models--someone--nano-7b" / "snapshots" / fourth / WEIGHTS
        while not whole.exists():
            count = ready(bora)
            seen += [] if whole.exists() else [count]
        result = deployed.result()

    assert result.returncode == 0, result.stderr
    assert set(seen) == {slots}
    assert "roll-out: 0 of " in result.stderr
    assert "downloading weights, " in result.stderr
    assert any("the next weights are on " in text for text in events(bora))


def fleet_of(folder: Path, replicas: int) -> Path:
    path = folder / f"{replicas}.yaml"
    path.write_text(FLEET.replace("{min: 1, max: 2}", f"{{min: {replicas}, max: {replicas}}}"))
    return path
