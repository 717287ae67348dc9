"""Room for a download in a node's cache: what was used least recently goes, never what is in use."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from cluster.cache_limits import GIB, CacheLimits
from cluster.cached_repo import CachedRepo
from cluster.errors import WeightsMissing

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
    try:
        found = scan_cache_dir(folder)
    except CacheNotFound:
        return []
    models = [each for each in found.repos if each.repo_type == "model"]
    whole = [
        Stored(repo, each.commit_hash, each.size_on_disk, repo.used_s(each.commit_hash))
        for model in models
        for repo in [CachedRepo(folder, model.repo_id)]
        for each in model.revisions
    ]
    return sorted([*whole, *_unfinished(folder)], key=lambda each: each.used_s)


def _unfinished(folder: Path) -> Iterator[Stored]:
    for repo in _repos(folder):
        with contextlib.suppress(OSError):  # somebody goes on with it
            parts = [part.stat() for part in (repo.path / "blobs").glob("*.incomplete")]
            if parts:
                size, used_s = sum(p.st_size for p in parts), max(p.st_mtime for p in parts)
                yield Stored(repo, "", size, used_s)


def make_room(folder: Path, limits: CacheLimits, repo: CachedRepo, more: int, whole: int) -> None:
    """See that `more` bytes can come for `repo`, which the caller has locked for a download.

    `whole`: bytes of the checkpoint that they complete.

    Raises:
        WeightsMissing: they cannot; with what would help.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if limits.max_bytes is not None and whole > limits.max_bytes:
        raise WeightsMissing(
            f"{repo.name} has {_gib(whole)}, the cache may hold {_gib(limits.max_bytes)} on each "
            f"node: raise model_cache.max_gib in the fleet"
        )
    with _only_one(folder):
        others = [each for each in _repos(folder) if each.path != repo.path]
        coming = more + sum(each.reserved_bytes() for each in others)
        if limits.max_bytes is not None and _over(folder, limits, coming) > 0:
            for oldest in stored(folder):
                _evict(folder, oldest, repo)
                if _over(folder, limits, coming) <= 0:
                    break
        if _over(folder, limits, coming) > 0:
            raise _no_room(folder, limits, repo, coming)
        repo.reserve(more)


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


def _evict(folder: Path, oldest: Stored, locked: CachedRepo) -> bool:
    """Take it away unless somebody uses it, or downloads into the same repository."""
    with contextlib.ExitStack() as stack:
        own = oldest.repo.path == locked.path
        if own and not oldest.commit:
            return False  # what we are about to go on with
        if not own and not stack.enter_context(oldest.repo.downloading()):
            return False
        if not oldest.commit:
            for part in (oldest.repo.path / "blobs").glob("*.incomplete"):
                part.unlink()
            return True
        if not stack.enter_context(oldest.repo.unused(oldest.commit)):
            return False
        # Blobs that another commit has as well stay. Other repositories may have a commit of the
        # same name.
        found = scan_cache_dir(folder)
        here = frozenset(each for each in found.repos if each.repo_path == oldest.repo.path)
        replace(found, repos=here).delete_revisions(oldest.commit).execute()
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
