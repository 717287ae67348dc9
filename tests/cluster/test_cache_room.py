"""What a node's model cache gives up for a download, whatever happened to it before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.cache_limits import CacheLimits
from cluster.cached_repo import CachedRepo
from cluster.errors import HubUnreachable, WeightsMissing
from cluster.hub import Hub
from cluster.model_cache import ModelCache, Wanted
from tests.cluster.fake_hub import Fault, running_hub
from tests.cluster.fake_hub import Hub as FakeHub

MAX = 200_000
REPOS = ("a/one", "a/two", "b/three")


def contents(seed: int, size: int) -> bytes:
    return bytes((seed * 31 + index * index) % 251 for index in range(1000)) * (size // 1000)


def files_of(repo: str, version: int) -> dict[str, bytes]:
    """Two shards, of which versions share the first."""
    seed = REPOS.index(repo)
    return {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": contents(seed, 40_000),
        "model-00002-of-00002.safetensors": contents(10 + 7 * seed + version, 30_000),
    }


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


def a_cache(folder: Path, hub: FakeHub | None, max_bytes: int | None = MAX) -> ModelCache:
    asked = None if hub is None else Hub(hub.url, attempts=1, pause=lambda _: None)
    return ModelCache(folder, hub=asked, limits=CacheLimits(max_bytes, 0))


def torn(hub: FakeHub, cache: ModelCache, wanted: Wanted) -> None:
    """A download that ends before its last shard."""
    hub.faults = [Fault("00002-of-00002.safetensors", times=9, status=503)]
    with pytest.raises(HubUnreachable):
        cache.fetch(wanted)
    hub.faults = []


def held(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.glob("models--*/blobs/*"))


def test_a_download_that_fits_in_no_case_evicts_nothing(hub: FakeHub, tmp_path: Path):
    for repo in REPOS:
        hub.publish(repo, files_of(repo, 1))
    cache = a_cache(tmp_path, hub, max_bytes=150_000)
    one, two = cache.fetch(Wanted("a/one")), cache.fetch(Wanted("a/two"))
    hub.publish("b/three", {"config.json": b"{}", "model.safetensors": contents(3, 90_000)})

    with (
        CachedRepo(tmp_path, "a/two").in_use(two.name),
        pytest.raises(WeightsMissing, match="no room"),
    ):
        cache.fetch(Wanted("b/three"))

    assert one.is_dir()


def test_a_repository_with_a_file_missing_is_evicted_like_others(hub: FakeHub, tmp_path: Path):
    hub.publish("a/one", files_of("a/one", 1))
    hub.publish("a/two", files_of("a/two", 1))
    cache = a_cache(tmp_path, hub, max_bytes=120_000)
    one = cache.fetch(Wanted("a/one"))
    (one / "config.json").resolve().unlink()

    two = cache.fetch(Wanted("a/two"))

    assert not one.exists()
    assert (two / "config.json").exists()


def test_what_a_torn_download_left_goes_although_a_commit_beside_it_is_in_use(
    hub: FakeHub, tmp_path: Path
):
    cache = a_cache(tmp_path, hub)
    hub.publish("a/one", files_of("a/one", 1))
    used = cache.fetch(Wanted("a/one"))
    hub.publish(
        "a/one", files_of("a/one", 2) | {"model-00001-of-00002.safetensors": contents(8, 60_000)}
    )
    with CachedRepo(tmp_path, "a/one").in_use(used.name):
        torn(hub, cache, Wanted("a/one"))
        hub.publish("a/two", {"config.json": b"{}", "model.safetensors": contents(3, 120_000)})

        cache.fetch(Wanted("a/two"))

        assert held(tmp_path) <= MAX
        assert (used / "model-00001-of-00002.safetensors").read_bytes() == contents(0, 40_000)


def test_what_was_left_of_a_version_before_the_branch_moved_makes_room_for_the_next_one(
    hub: FakeHub, tmp_path: Path
):
    cache = a_cache(tmp_path, hub, max_bytes=110_000)
    hub.publish("a/one", {"config.json": b"{}", "model.safetensors": contents(3, 80_000)})
    blob = cache.fetch(Wanted("a/one")) / "model.safetensors"
    blob.resolve().rename(f"{blob.resolve()}.incomplete")
    blob.unlink()
    hub.publish("a/one", files_of("a/one", 2))

    assert cache.fetch(Wanted("a/one")).is_dir()
    assert held(tmp_path) <= 110_000


def test_files_elsewhere_that_a_snapshot_links_to_are_never_deleted(hub: FakeHub, tmp_path: Path):
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"mine")
    cache = a_cache(tmp_path / "cache", hub, max_bytes=75_000)
    hub.publish("a/one", files_of("a/one", 1))
    one = cache.fetch(Wanted("a/one"))
    (one / "extra.safetensors").symlink_to(own)
    hub.publish("a/two", files_of("a/two", 1))

    cache.fetch(Wanted("a/two"))

    assert not one.exists()
    assert own.read_bytes() == b"mine"


def test_offline_a_checkpoint_that_others_left_half_is_not_taken_for_whole(
    hub: FakeHub, tmp_path: Path
):
    hub.publish("a/one", files_of("a/one", 1))
    one = a_cache(tmp_path, hub).fetch(Wanted("a/one"))
    shutil.rmtree(one.parents[1] / ".bora")  # nobody knows what the hub listed
    (one / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(WeightsMissing, match=r"model-00002-of-00002.safetensors is missing"):
        a_cache(tmp_path, None).fetch(Wanted("a/one"))


Step = tuple[str, int, int]
STEPS = st.tuples(
    st.sampled_from(["fetch", "fetch", "fetch", "tear", "use", "free", "move", "spoil", "offline"]),
    st.integers(0, 2),
    st.integers(0, 10**6),
)


class Life:
    """A cache to which things happen. `used` are snapshots that somebody has open."""

    def __init__(self, hub: FakeHub, folder: Path, stack: ExitStack) -> None:
        self.hub, self.folder, self._stack = hub, folder, stack
        self.versions = dict.fromkeys(REPOS, 1)
        self.used: dict[Path, ExitStack] = {}
        for repo in REPOS:
            hub.publish(repo, files_of(repo, 1))

    def happen(self, what: str, repo: str, number: int) -> None:
        if what == "fetch":
            self.fetch(repo, self.hub)
        elif what == "offline":
            self.fetch(repo, None)
        elif what == "tear":
            self.hub.faults = [Fault("00002-of-00002.safetensors", times=9, status=503)]
            self.fetch(repo, self.hub)
            self.hub.faults = []
        elif what == "move":
            self.versions[repo] += 1
            self.hub.publish(repo, files_of(repo, self.versions[repo]))
        elif what == "use" and (folder := self.fetch(repo, self.hub)):
            lock = self._stack.enter_context(ExitStack())
            lock.enter_context(CachedRepo(self.folder, repo).in_use(folder.name))
            self.used.setdefault(folder, lock)
        elif what == "free" and self.used:
            self.used.pop(next(iter(self.used))).close()
        elif what == "spoil":
            self.spoil(number)

    def fetch(self, repo: str, hub: FakeHub | None) -> Path | None:
        before = set(self.folder.glob("models--*/snapshots/*"))
        try:
            folder = a_cache(self.folder, hub).fetch(Wanted(repo))
        except WeightsMissing as error:
            if "no room" in str(error):
                mine = self.folder / f"models--{repo.replace('/', '--')}"
                kept = {each.parents[1] for each in self.used} - {mine}
                assert len(kept) == 2 or any(each.parents[1] == mine for each in self.used)
                assert before <= set(self.folder.glob("models--*/snapshots/*"))
            return None
        versions = [files_of(repo, number + 1) for number in range(self.versions[repo])]
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert found == versions[-1] if hub else found in versions
        return folder

    def spoil(self, number: int) -> None:
        """Somebody writes to a file that nobody uses, or takes it away."""
        open_ = {path.resolve() for folder in self.used for path in folder.iterdir()}
        blobs = sorted(set(self.folder.resolve().glob("models--*/blobs/*")) - open_)
        if not blobs:
            return
        blob, size = blobs[number % len(blobs)], blobs[number % len(blobs)].stat().st_size
        if number % 4 == 0:
            blob.unlink()
        elif number % 4 == 1:
            os.truncate(blob, size // 2)
        elif number % 4 == 2:
            blob.write_bytes(blob.read_bytes() + b"more")
        else:
            blob.write_bytes(bytes(size))

    def check(self) -> None:
        assert held(self.folder) <= MAX
        for folder in self.used:
            assert {path.name for path in folder.iterdir()} == set(files_of(REPOS[0], 1))
            assert all(path.stat().st_size for path in folder.iterdir())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=4, max_size=12))
def test_whatever_happens_what_is_used_stays_and_the_limit_holds(hub: FakeHub, steps: list[Step]):
    hub.faults = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        life = Life(hub, Path(folder).resolve(), stack)
        for what, repo, number in steps:
            life.happen(what, REPOS[repo], number)
            life.check()
