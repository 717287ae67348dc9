"""Room for a download in a node's cache: what was used least recently goes, never what is in use."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import socket
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.cache_limits import GIB, CacheLimits
from cluster.cached_repo import CachedRepo
from cluster.errors import WeightsMissing
from cluster.hub_file import HubFile

_MODELS = "models--"


@dataclass(frozen=True, slots=True)
class Stored:
    """Something that could be evicted. `commit` is empty for downloads that were never finished."""

    repo: CachedRepo
    commit: str
    size_bytes: int
    used_s: float  # epoch seconds, when it was used last


def stored(folder: Path) -> list[Stored]:
    """All models in the cache `folder`, those that were used least recently first."""
    found = [each for repo in _repos(folder) for each in _stored(repo)]
    return sorted(found, key=lambda each: each.used_s)


def _stored(repo: CachedRepo) -> Iterator[Stored]:
    for commit in repo.commits():
        yield Stored(repo, commit, _size(repo.blobs_of(commit)), repo.used_s(commit))
    loose = repo.loose_blobs()
    if loose:
        yield Stored(repo, "", _size(loose), max(_status(blob, "st_mtime") for blob in loose))


def _size(blobs: Iterable[Path]) -> int:
    return round(sum(_status(blob, "st_size") for blob in blobs))


def _status(blob: Path, what: str) -> float:
    with contextlib.suppress(FileNotFoundError):  # renamed or evicted meanwhile
        return float(getattr(blob.stat(), what))
    return 0.0


def make_room(
    folder: Path, limits: CacheLimits, repo: CachedRepo, files: Iterable[HubFile], more: int
) -> None:
    """See that `more` bytes can come for `repo`, which the caller has locked for a download.

    They complete the checkpoint that `files` are; of these nothing goes.

    Raises:
        WeightsMissing: they cannot; with what would help.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {file.checksum: file.size_bytes for file in files}
    whole = sum(sizes.values())
    if limits.max_bytes is not None and whole > limits.max_bytes:
        raise WeightsMissing(
            f"{repo.name} has {_gib(whole)}, the cache may hold {_gib(limits.max_bytes)} on each "
            f"node: raise model_cache.max_gib in the fleet"
        )
    with _only_one(folder):
        others = [each for each in _repos(folder) if each.path != repo.path]
        coming = more + sum(each.reserved_bytes() for each in others)
        kept: set[tuple[Path, str]] = set()  # what somebody began to use, or may not be deleted
        while (over := _over(folder, limits, coming)) > 0:
            chosen = (
                _enough(folder, over, repo, sizes.keys(), kept)
                if limits.max_bytes is not None
                else []
            )
            if not chosen:
                raise _no_room(folder, limits, repo, coming)
            for oldest in chosen:
                if not _evict(oldest, repo, sizes.keys()):
                    kept.add((oldest.repo.path, oldest.commit))
        repo.reserve(more)


def _enough(
    folder: Path,
    over: int,
    locked: CachedRepo,
    needed: Collection[str],
    kept: Collection[tuple[Path, str]],
) -> list[Stored]:
    """Which go so that `over` bytes are freed, the least recently used first; empty: not enough.

    Nothing is deleted for a download that has no room all the same.
    """
    chosen: list[Stored] = []
    freed: dict[Path, int] = {}
    for each in stored(folder):
        if (each.repo.path, each.commit) not in kept and _may_go(each, locked):
            chosen.append(each)
            here = {other.commit for other in chosen if other.repo.path == each.repo.path}
            freed[each.repo.path] = _freed(each.repo, here, needed)
            if sum(freed.values()) >= over:
                return chosen
    return []


def _freed(repo: CachedRepo, commits: Collection[str], needed: Collection[str]) -> int:
    """Bytes that go with these commits; an empty one stands for what is unfinished."""
    gone = {blob for commit in commits if commit for blob in repo.blobs_of(commit)}
    kept = (repo.blobs_of(commit) for commit in repo.commits() if commit not in commits)
    loose = repo.loose_blobs(needed) if "" in commits else set()
    return _size(gone.difference(*kept) | loose)


def _may_go(each: Stored, locked: CachedRepo) -> bool:
    """As far as one can see: `_evict` takes the locks."""
    if each.commit and each.repo.is_used(each.commit):
        return False
    if each.repo.path == locked.path:
        return True
    with each.repo.downloading() as idle:
        return idle


def _over(folder: Path, limits: CacheLimits, more: int) -> int:
    """By how many bytes `more` would be too many."""
    over = more + limits.keep_free_bytes - shutil.disk_usage(folder).free
    if limits.max_bytes is not None:
        over = max(over, _held_bytes(folder) + more - limits.max_bytes)
    return over


def _held_bytes(folder: Path) -> int:
    return sum(repo.blob_bytes() for repo in _repos(folder))


def _repos(folder: Path) -> list[CachedRepo]:
    """Of models, finished or not."""
    names = (path.name.removeprefix(_MODELS) for path in folder.glob(f"{_MODELS}*"))
    return [CachedRepo(folder, name.replace("--", "/")) for name in names]


def _evict(oldest: Stored, locked: CachedRepo, needed: Collection[str]) -> bool:
    """Take it away unless somebody uses it, or downloads into the same repository."""
    with contextlib.ExitStack() as stack:
        own = oldest.repo.path == locked.path
        if not own and not stack.enter_context(oldest.repo.downloading()):
            return False
        if oldest.commit and not stack.enter_context(oldest.repo.unused(oldest.commit)):
            return False
        try:
            if oldest.commit:
                oldest.repo.forget(oldest.commit)
            else:
                for part in oldest.repo.loose_blobs(needed):
                    part.unlink(missing_ok=True)
        except PermissionError:
            return False  # another account's
        return True


def _no_room(folder: Path, limits: CacheLimits, repo: CachedRepo, more: int) -> WeightsMissing:
    free = shutil.disk_usage(folder).free
    held = _held_bytes(folder)
    text = (
        f"no room for {repo.name} on {socket.gethostname()}: {more:,} bytes are needed in {folder}"
        f", {free:,} are free, {limits.keep_free_bytes:,} must stay free"
    )
    if limits.max_bytes is None:
        return WeightsMissing(
            f"{text}. Of {_gib(held)} of models there nothing is evicted: set model_cache.max_gib "
            f"in the fleet, delete some (`hf cache rm`), or put HF_HOME on a larger disk"
        )
    return WeightsMissing(
        f"{text}; models there hold {_gib(held)} of at most {_gib(limits.max_bytes)}, and the rest "
        f"is in use: raise model_cache.max_gib, or put HF_HOME on a larger disk"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two must not count on the same room."""
    (folder / ".locks").mkdir(exist_ok=True)
    with (folder / ".locks" / "bora-room.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
