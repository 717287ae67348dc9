"""Adapters of a hub come to a node as weights do: through its model cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.adapter_folder import adapter_repo, locate_adapter, locate_on_all
from cluster.cached_repo import CachedRepo
from cluster.errors import AdapterFailed
from placement.model_cache import ModelCacheSpec
from tests.cluster.fake_hub import Fault, Hub, running_hub

REPO = "acme/legal"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b'{"r": 8}', WEIGHTS: bytes(range(250)) * 20_000, "README.md": b"# legal"}
STATES = {"checkpoint-5/adapter_model.safetensors": b"old", "optimizer.pt": b"x" * 10**6}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.publish(REPO, {**FILES, **STATES})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        yield hub


async def test_an_adapter_comes_through_the_cache_without_the_states_of_its_training(
    hub: Hub, tmp_path: Path
):
    told: list[str] = []
    log = tmp_path / "replica-adapters.log"

    folder = await locate_adapter(REPO, ModelCacheSpec(), log, told.append)

    assert {path.name for path in folder.rglob("*")} == {CONFIG, WEIGHTS}
    assert (folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert told[0] == "downloading weights, 0 % of 4.8 MiB"
    assert told[-1] == ""
    assert "weights: downloading weights, 0 % of 4.8 MiB" in log.read_text()
    with CachedRepo(tmp_path / "hub", REPO).unused(folder.name) as unused:
        assert not unused  # while this process lives it is not evicted


async def test_a_commit_that_is_here_starts_no_process_and_asks_no_hub(hub: Hub, tmp_path: Path):
    commit = hub.publish(REPO, FILES)
    folder = await locate_adapter(f"{REPO}@{commit}", ModelCacheSpec(), tmp_path / "first.log")
    hub.asked.clear()

    again = await locate_adapter(f"{REPO}@{commit}", ModelCacheSpec(), tmp_path / "second.log")

    assert again == folder
    assert hub.asked == []
    assert not (tmp_path / "second.log").exists()


async def test_a_download_that_breaks_off_goes_on_and_what_is_damaged_is_refused(
    hub: Hub, tmp_path: Path
):
    hub.faults = [Fault(WEIGHTS, cut_after=10**6)]
    folder = await locate_adapter(REPO, ModelCacheSpec(), tmp_path / "log")
    assert (folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert len([path for path, _ in hub.starts if path == WEIGHTS]) == 2

    hub.publish("acme/damaged", FILES)
    hub.faults = [Fault(WEIGHTS, times=9, flip=True)]
    with pytest.raises(AdapterFailed, match=r"acme/damaged: .* its checksum is "):
        await locate_adapter("acme/damaged", ModelCacheSpec(), tmp_path / "log")


async def test_what_is_no_adapter_is_told_with_what_it_lacks(hub: Hub, tmp_path: Path):
    hub.publish("acme/model", {"config.json": b"{}", "model.safetensors": b"x" * 2000})

    with pytest.raises(AdapterFailed, match=r"holds no LoRA adapter: no adapter_config.json with"):
        await locate_adapter("acme/model", ModelCacheSpec(), tmp_path / "log")


async def test_an_offline_fleet_downloads_no_adapter(hub: Hub, tmp_path: Path):
    with pytest.raises(AdapterFailed, match="but nothing of it is there"):
        await locate_adapter(REPO, ModelCacheSpec(offline=True), tmp_path / "log")
    assert hub.asked == []


@pytest.mark.parametrize("source", ["/srv/lora", "./a/b", "~/lora", "lora", "a/b/c", "a b/c"])
def test_what_no_repository_can_be_called_is_a_folder(source: str):
    assert adapter_repo(source) is None


def test_a_repository_may_name_its_revision():
    found = adapter_repo("acme/legal@v2")

    assert found is not None
    assert (found.repo, found.revision, found.checkpoint_format) == ("acme/legal", "v2", "lora")


async def test_every_node_of_a_gang_brings_the_commit_that_the_leaders_node_has(
    hub: Hub, tmp_path: Path
):
    asked: list[str] = []

    async def elsewhere(source: str, cache: ModelCacheSpec) -> str:
        asked.append(source)
        return str(await locate_adapter(source, cache, tmp_path / "other.log"))

    others = {"rank 1 on b": elsewhere, "rank 2 on c": elsewhere}
    told: list[str] = []
    folder = await locate_on_all(REPO, ModelCacheSpec(), tmp_path / "log", others, told.append)

    assert (folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert asked == [f"{REPO}@{folder.name}"] * 2
    assert told[-1] == "waiting for rank 1 on b and rank 2 on c"


async def test_a_folder_is_the_same_one_on_every_node(tmp_path: Path):
    (tmp_path / "legal").mkdir()
    (tmp_path / "legal" / CONFIG).write_bytes(FILES[CONFIG])
    source = str(tmp_path / "legal")

    async def elsewhere(source: str, cache: ModelCacheSpec) -> str:
        return str(await locate_adapter(source, cache, tmp_path / "other.log"))

    others = {"rank 1 on b": elsewhere}
    log = tmp_path / "log"
    assert await locate_on_all(source, ModelCacheSpec(), log, others) == Path(source)


async def test_a_node_that_cannot_have_the_adapter_is_named_with_the_cause(
    hub: Hub, tmp_path: Path
):
    async def here(source: str, cache: ModelCacheSpec) -> str:
        return str(await locate_adapter(source, cache, tmp_path / "other.log"))

    async def offline(source: str, cache: ModelCacheSpec) -> str:
        commit = "0" * 40  # not in the cache
        return await here(f"{REPO}@{commit}", ModelCacheSpec(offline=True))

    others = {"rank 1 on b": here, "rank 2 on c": offline}
    with pytest.raises(AdapterFailed, match=r"^rank 2 on c: acme/legal@0+: .* nothing of it is th"):
        await locate_on_all(REPO, ModelCacheSpec(), tmp_path / "log", others)


async def test_a_node_that_has_the_adapter_elsewhere_is_named_with_both_folders(
    hub: Hub, tmp_path: Path
):
    async def elsewhere(source: str, cache: ModelCacheSpec) -> str:
        return "/data/legal"

    others = {"rank 1 on b": elsewhere}
    with pytest.raises(AdapterFailed, match=r"is in /data/legal for rank 1 on b, but in .*HF_HUB_"):
        await locate_on_all(REPO, ModelCacheSpec(), tmp_path / "log", others)
