"""A replica's way to its weights: through a process that it starts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import weights
from cluster.cached_repo import CachedRepo
from cluster.errors import WeightsMissing
from placement.checkpoint_room import SIM_FETCH
from placement.model_cache import ModelCacheSpec
from tests.builders import a_shape, a_variant
from tests.cluster.fake_hub import Fault, Hub, running_hub

MIB = 2**20
REPO = "someone/Small"
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(250)) * 20_000}
VARIANT = a_variant(checkpoint=REPO, shape=a_shape(engine="vllm"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.publish(REPO, FILES)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        yield hub


async def test_weights_come_and_what_happens_is_told_and_logged(hub: Hub, tmp_path: Path):
    told: list[str] = []
    log = tmp_path / "logs" / "replica.log"

    folder = await weights.bring(VARIANT, log, told.append)

    assert isinstance(folder, Path)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert told[0] == "downloading weights, 0 % of 4.8 MiB"
    assert told[-1] == ""
    assert "weights: downloading weights, 0 % of 4.8 MiB" in log.read_text()


async def test_a_pinned_commit_that_is_here_starts_no_process_and_asks_no_hub(
    hub: Hub, tmp_path: Path
):
    commit = hub.publish(REPO, FILES)
    pinned = VARIANT.model_copy(update={"commit": commit})
    folder = await weights.bring(pinned, tmp_path / "first.log")
    hub.asked.clear()

    assert await weights.bring(pinned, tmp_path / "second.log") == folder
    assert hub.asked == []
    assert not (tmp_path / "second.log").exists()


async def test_what_was_brought_is_in_use_while_this_process_lives(hub: Hub, tmp_path: Path):
    folder = await weights.bring(VARIANT, tmp_path / "log")

    assert isinstance(folder, Path)
    with CachedRepo(tmp_path / "hub", REPO).unused(folder.name) as unused:
        assert not unused


async def test_the_hubs_refusal_is_the_error_of_the_replica(hub: Hub, tmp_path: Path):
    hub.faults = [Fault(status=401, times=9)]

    with pytest.raises(WeightsMissing, match=r"answers 401: give .* a token .*HF_TOKEN"):
        await weights.bring(VARIANT, tmp_path / "log")


async def test_an_offline_fleet_says_what_is_missing(hub: Hub, tmp_path: Path):
    offline = VARIANT.model_copy(update={"model_cache": ModelCacheSpec(offline=True)})

    with pytest.raises(WeightsMissing, match="but nothing of it is there"):
        await weights.bring(offline, tmp_path / "log")
    assert hub.asked == []


async def test_a_simulated_engine_fetches_weights_only_when_told_to(hub: Hub, tmp_path: Path):
    sim = a_variant(checkpoint=REPO)
    fetching = a_variant(checkpoint=REPO, shape=a_shape(engine_args=(SIM_FETCH,)))

    assert await weights.bring(sim, tmp_path / "log") == REPO
    assert isinstance(await weights.bring(fetching, tmp_path / "log"), Path)


async def test_a_replica_that_is_stopped_ends_its_download(hub: Hub, tmp_path: Path):
    hub.bytes_per_s = 100_000
    task = asyncio.create_task(weights.bring(VARIANT, tmp_path / "log"))
    while not hub.starts:
        await asyncio.sleep(0.05)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert psutil.Process().children(recursive=True) == []


def test_a_replica_that_is_killed_takes_its_download_along_and_the_next_goes_on(
    hub: Hub, tmp_path: Path
):
    hub.bytes_per_s = 5_000_000
    content = bytes(range(250)) * 60_000
    hub.publish(REPO, {**FILES, "model.safetensors": content})
    log = str(tmp_path / "log")
    program = (
        "import asyncio, sys; from pathlib import Path; from cluster import weights;"
        "from tests.cluster.test_weights import VARIANT;"
        "print(asyncio.run(weights.bring(VARIANT, Path(sys.argv[1]))))"
    )
    replica = subprocess.Popen([sys.executable, "-c", program, log])
    partial = tmp_path / "hub"
    while not any(each.stat().st_size > MIB for each in partial.glob("*/blobs/*.incomplete")):
        assert replica.poll() is None
        time.sleep(0.05)
    child = psutil.Process(replica.pid).children()[0]
    os.kill(replica.pid, 9)
    replica.wait()
    psutil.wait_procs([child], timeout=10)
    hub.bytes_per_s = None

    done = subprocess.run(
        [sys.executable, "-c", program, log], capture_output=True, text=True, check=True
    )

    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == content
    first, second = (start for path, start in hub.starts if path == "model.safetensors")
    assert first == 0
    assert second > 0
