from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.cache_limits import GIB, CacheLimits
from cluster.cached_repo import CachedRepo
from cluster.cli.cached import show_cached
from cluster.errors import HubUnreachable, WeightsMissing
from cluster.hub import Hub
from cluster.model_cache import ModelCache, Wanted
from tests.cluster.fake_hub import Fault, running_hub
from tests.cluster.fake_hub import Hub as FakeHub

REPO = "someone/Small"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
WANTED = Wanted(REPO)
NOWHERE = "http://127.0.0.1:1"


def weights(seed: int, size: int = 300_000) -> bytes:
    return bytes((seed * 31 + index * index) % 251 for index in range(1000)) * (size // 1000)


FILES = {
    "config.json": b"{}",
    "README.md": b"read me",
    SHARD: weights(1),
    OTHER: weights(2),
    "pytorch_model.bin": weights(3),
    "consolidated.safetensors": weights(4),
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        hub.publish(REPO, FILES)
        yield hub


class Node:
    """A cache on a node of its own, and what it tells."""

    def __init__(
        self, folder: Path, hub: FakeHub | None, limits: CacheLimits | None = None
    ) -> None:
        self.told: list[str] = []
        asked = None if hub is None else Hub(hub.url, attempts=3, pause=lambda _: None)
        self.cache = ModelCache(folder, hub=asked, limits=limits or CacheLimits(None, 0))

    def fetch(self, wanted: Wanted = WANTED) -> Path:
        return self.cache.fetch(wanted, self.told.append)


@pytest.fixture
def node(tmp_path: Path, hub: FakeHub) -> Node:
    return Node(tmp_path, hub)


def test_a_checkpoint_is_downloaded_without_the_forms_that_no_engine_loads(
    node: Node, hub: FakeHub
):
    folder = node.fetch()

    assert {path.name for path in folder.iterdir()} == {"config.json", "README.md", SHARD, OTHER}
    assert (folder / SHARD).read_bytes() == FILES[SHARD]
    assert sum(hub.sent) == 2 * 300_000 + 2 + 7
    assert node.told[0] == "downloading weights, 0 % of 0.6 MiB"


def test_mistrals_own_form_is_chosen_where_the_repository_has_both(node: Node):
    folder = node.fetch(Wanted(REPO, checkpoint_format="mistral"))

    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "consolidated.safetensors"
    ]


def test_a_gguf_file_is_chosen_by_its_precision(node: Node, hub: FakeHub):
    repo = "someone/Small-GGUF"
    hub.publish(repo, {"Small-Q4_K_M.gguf": weights(5), "Small-Q8_0.gguf": weights(6)})

    folder = node.fetch(Wanted(repo, checkpoint_format="gguf", precision="q4_k_m"))

    assert [path.name for path in folder.iterdir()] == ["Small-Q4_K_M.gguf"]


def test_the_second_one_on_a_node_downloads_nothing(node: Node, hub: FakeHub):
    first = node.fetch()
    hub.sent.clear()

    assert node.fetch() == first
    assert node.cache.find(WANTED) == first
    assert hub.sent == []


def test_two_at_once_download_once_and_the_other_says_that_it_waits(tmp_path: Path, hub: FakeHub):
    hub.bytes_per_s = 500_000
    nodes = [Node(tmp_path, hub), Node(tmp_path, hub)]
    threads = [threading.Thread(target=each.fetch) for each in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    told = [text for each in nodes for text in each.told]
    assert sum(hub.sent) == 2 * 300_000 + 2 + 7
    assert any(text.startswith("waiting for another replica's download, ") for text in told)


def test_a_connection_that_ends_half_way_goes_on_where_it_ended(node: Node, hub: FakeHub):
    content = weights(7, 12_000_000)
    hub.publish("a/large", {"model.safetensors": content})
    hub.faults = [Fault("model.safetensors", cut_after=11_000_000)]

    folder = node.fetch(Wanted("a/large"))

    assert (folder / "model.safetensors").read_bytes() == content
    assert [start for _, start in hub.starts] == [0, constants.DOWNLOAD_CHUNK_SIZE]


def test_what_a_process_before_left_is_gone_on_with(node: Node, hub: FakeHub, tmp_path: Path):
    whole = CachedRepo(node.fetch().parents[2], REPO)
    commit = hub.publish(REPO, FILES)
    file = next(each for each in whole.files(commit) or () if each.path == SHARD)
    whole.blob(file).rename(f"{whole.blob(file)}.incomplete")
    os.truncate(f"{whole.blob(file)}.incomplete", 120_000)
    hub.starts.clear()

    folder = node.fetch()

    assert (folder / SHARD).read_bytes() == FILES[SHARD]
    assert hub.starts == [(SHARD, 120_000)]


def test_wrong_bytes_are_fetched_again(node: Node, hub: FakeHub):
    hub.faults = [Fault(SHARD, flip=True)]

    folder = node.fetch()

    assert (folder / SHARD).read_bytes() == FILES[SHARD]


def test_wrong_bytes_twice_are_refused_by_name(node: Node, hub: FakeHub):
    hub.faults = [Fault(SHARD, times=9, flip=True)]

    with pytest.raises(WeightsMissing, match=f"{SHARD}: its checksum is .* instead of .*damaged"):
        node.fetch()

    assert node.cache.find(WANTED) is None


def test_a_file_that_changed_on_disk_is_fetched_again_and_only_that(node: Node, hub: FakeHub):
    folder = node.fetch()
    blob = (folder / SHARD).resolve()
    damaged = bytearray(blob.read_bytes())
    damaged[1234] ^= 1
    blob.write_bytes(damaged)
    hub.starts.clear()

    assert node.cache.find(WANTED) is None
    folder = node.fetch()

    assert (folder / SHARD).read_bytes() == FILES[SHARD]
    assert hub.starts == [(SHARD, 0)]
    assert f"damaged on disk: {SHARD}" in node.told


def test_what_others_downloaded_is_compared_and_not_fetched(node: Node, hub: FakeHub):
    folder = node.fetch()
    (folder.parents[1] / ".bora" / "checked.json").unlink()
    hub.sent.clear()

    node.fetch()

    assert hub.sent == []
    assert "comparing 4 files with their checksums" in node.told


def test_files_beyond_what_plain_http_carries_are_left_to_the_hubs_library(
    tmp_path: Path, hub: FakeHub
):
    asked = Hub(hub.url, attempts=1, pause=lambda _: None, http_limit=100_000)

    folder = ModelCache(tmp_path, hub=asked, limits=CacheLimits(None, 0)).fetch(WANTED)

    assert (folder / SHARD).read_bytes() == FILES[SHARD]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_asked_again(node: Node, hub: FakeHub, status: int):
    hub.faults = [Fault(SHARD, times=1, status=status)]

    assert (node.fetch() / SHARD).exists()


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        (401, WeightsMissing, "HF_TOKEN"),
        (403, WeightsMissing, "token"),
        (404, WeightsMissing, "404"),
        (503, HubUnreachable, "answers 503"),
    ],
)
def test_a_refusal_says_what_to_do(
    node: Node, hub: FakeHub, status: int, error: type[Exception], text: str
):
    hub.refuse = status

    with pytest.raises(error, match=text):
        node.fetch()


def test_an_unknown_repository_and_an_unknown_revision_are_named(node: Node):
    with pytest.raises(WeightsMissing, match="no repository nobody/Nothing"):
        node.fetch(Wanted("nobody/Nothing"))
    with pytest.raises(WeightsMissing, match=f"{REPO} has no revision 'v9'"):
        node.fetch(Wanted(REPO, "v9"))


def test_a_repository_without_weights_is_no_checkpoint(node: Node, hub: FakeHub):
    hub.publish("someone/Empty", {"config.json": b"{}"})

    with pytest.raises(WeightsMissing, match="someone/Empty holds no hf checkpoint"):
        node.fetch(Wanted("someone/Empty"))


def test_without_a_hub_what_is_here_is_taken(node: Node, tmp_path: Path):
    folder = node.fetch()

    assert Node(tmp_path, None).fetch() == folder


@pytest.mark.parametrize("status", [None, 503])
def test_a_hub_that_does_not_answer_is_no_harm_when_the_branch_is_here(
    node: Node, hub: FakeHub, tmp_path: Path, status: int | None
):
    folder = node.fetch()
    hub.refuse = status
    late = Hub(hub.url if status else NOWHERE, attempts=2, pause=lambda _: None)
    told: list[str] = []

    assert ModelCache(tmp_path, hub=late).fetch(WANTED, told.append) == folder
    assert told[0].startswith("the hub does not answer: taking ")


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path):
    late = Hub(NOWHERE, attempts=1, pause=lambda _: None)

    with pytest.raises(HubUnreachable, match=f"{NOWHERE} cannot be reached from .*HTTPS_PROXY"):
        ModelCache(tmp_path, hub=late).fetch(WANTED)


def test_a_commit_that_was_decided_on_is_taken_and_the_branch_is_known_offline(
    node: Node, hub: FakeHub, tmp_path: Path
):
    first = hub.publish(REPO, FILES)
    hub.publish(REPO, {**FILES, OTHER: weights(9)})

    folder = node.fetch(Wanted(REPO, commit=first))

    assert (folder / OTHER).read_bytes() == FILES[OTHER]
    assert Node(tmp_path, None).fetch() == folder


def test_offline_names_what_is_missing(node: Node, tmp_path: Path):
    (node.fetch() / OTHER).resolve().unlink()

    with pytest.raises(
        WeightsMissing, match=f"nothing is downloaded there, but {OTHER} is missing"
    ):
        Node(tmp_path, None).fetch()
    with pytest.raises(WeightsMissing, match="nothing of it is there"):
        Node(tmp_path, None).fetch(Wanted("someone/Else"))


def test_no_room_is_said_before_a_byte_comes_with_host_folder_and_bytes(
    tmp_path: Path, hub: FakeHub
):
    node = Node(tmp_path, hub, CacheLimits(None, keep_free_bytes=10**6 * GIB))

    with pytest.raises(WeightsMissing) as raised:
        node.fetch()

    for told in (os.uname().nodename, str(tmp_path), "600,009 bytes are needed", "are free"):
        assert told in str(raised.value)
    assert hub.sent == []


def test_the_least_recently_used_goes_when_the_cache_is_full(tmp_path: Path, hub: FakeHub):
    node = Node(tmp_path, hub, CacheLimits(1_500_000, 0))
    folders = {}
    for number, name in enumerate(("a/one", "a/two", "a/three")):
        hub.publish(name, {"config.json": b"{}", "model.safetensors": weights(number, 600_000)})
    for name in ("a/one", "a/two", "a/one", "a/three"):
        folders[name] = node.fetch(Wanted(name))

    assert folders["a/one"].exists()
    assert not folders["a/two"].exists()
    assert folders["a/three"].exists()


def test_what_is_in_use_is_never_evicted(tmp_path: Path, hub: FakeHub):
    node = Node(tmp_path, hub, CacheLimits(1_000_000, 0))
    for number, name in enumerate(("a/one", "a/two")):
        hub.publish(name, {"config.json": b"{}", "model.safetensors": weights(number, 600_000)})
    one = node.fetch(Wanted("a/one"))

    with (
        CachedRepo(tmp_path, "a/one").in_use(one.name),
        pytest.raises(WeightsMissing, match=r"in use: raise model_cache\.max_gib"),
    ):
        node.fetch(Wanted("a/two"))

    assert one.exists()
    node.fetch(Wanted("a/two"))
    assert not one.exists()


def test_an_older_commit_goes_for_a_newer_one_and_leaves_it_what_they_share(
    tmp_path: Path, hub: FakeHub
):
    node = Node(tmp_path, hub, CacheLimits(1_000_000, 0))
    old = node.fetch()
    hub.publish(REPO, {**FILES, OTHER: weights(9, 500_000)})
    hub.starts.clear()

    new = node.fetch()

    assert not old.exists()
    assert (new / SHARD).read_bytes() == FILES[SHARD]
    assert hub.starts == [(OTHER, 0)]


def test_two_downloads_do_not_count_on_the_same_room(tmp_path: Path, hub: FakeHub):
    slow, late = (Node(tmp_path, hub, CacheLimits(1_000_000, 0)) for _ in range(2))
    for number, name in enumerate(("a/one", "a/two")):
        hub.publish(name, {"config.json": b"{}", "model.safetensors": weights(number, 600_000)})
    hub.bytes_per_s = 300_000
    first = threading.Thread(target=slow.fetch, args=(Wanted("a/one"),))
    first.start()
    while not hub.starts:
        time.sleep(0.05)

    with pytest.raises(WeightsMissing, match="no room for a/two"):
        late.fetch(Wanted("a/two"))

    first.join()
    assert slow.cache.find(Wanted("a/one")) is not None


def test_a_folder_that_others_fill_is_taken_as_it_is_and_not_written_to(
    node: Node, hub: FakeHub, tmp_path: Path
):
    folder = node.fetch()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    hub.asked.clear()
    asked = Hub(hub.url)
    cache = ModelCache(tmp_path, hub=asked, read_only=True)

    assert cache.fetch(WANTED) == folder
    assert cache.keep(WANTED, folder)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert hub.asked == []
    (folder / OTHER).unlink()
    with pytest.raises(WeightsMissing, match=f"{OTHER} is missing, and the folder is read-only"):
        cache.fetch(WANTED)


def test_bora_lists_what_a_host_has(
    node: Node,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    commit = node.fetch().name

    with CachedRepo(tmp_path, REPO).in_use(commit):
        show_cached(json_=True)
        show_cached(json_=False)

    told, page = capsys.readouterr().out.split("\n", 1)
    [model] = json.loads(told)["models"]
    assert (model["repo"], model["commit"], model["bytes"]) == (REPO, commit, 600_009)
    assert model["in_use"]
    assert commit[:12] in page
    assert "in use" in page


def test_a_checkpoint_larger_than_the_cache_evicts_nothing(tmp_path: Path, hub: FakeHub):
    node = Node(tmp_path, hub, CacheLimits(700_000, 0))
    there = node.fetch()
    hub.publish("a/big", {"config.json": b"{}", "model.safetensors": weights(1, 900_000)})

    with pytest.raises(WeightsMissing, match="the cache may hold"):
        node.fetch(Wanted("a/big"))

    assert there.exists()
