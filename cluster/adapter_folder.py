"""Where a LoRA adapter's files are: in a folder of its own, or in the model cache, on every node."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from cluster import weights
from cluster.errors import AdapterFailed, WeightsMissing
from cluster.model_cache import Wanted, silent
from cluster.weight_files import ADAPTER_CONFIG
from placement.model_cache import ModelCacheSpec

_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Elsewhere(Protocol):
    """`locate_adapter` on another node."""

    async def __call__(self, source: str, cache: ModelCacheSpec) -> str:
        """The folder there; `AdapterFailed`."""
        ...


async def locate_on_all(
    source: str,
    cache: ModelCacheSpec,
    log: Path,
    others: Mapping[str, Elsewhere],
    tell: Callable[[str], None] = silent,
) -> Path:
    """`locate_adapter` here, then on all nodes of a gang, whose ranks each read the files.

    `others` are the other nodes, by how they are called. They bring the commit that came here: a
    repository may get another one meanwhile.

    Raises:
        AdapterFailed: as `locate_adapter`; or one has it elsewhere, and an engine is told one path.
    """
    folder = await locate_adapter(source, cache, log, tell)
    if not others:
        return folder
    tell(f"waiting for {' and '.join(others)}")
    same = _at_commit(source, folder)
    places = (locate(same, cache) for locate in others.values())
    found = await asyncio.gather(*places, return_exceptions=True)
    for name, there in zip(others, found, strict=True):
        if isinstance(there, AdapterFailed):
            raise AdapterFailed(f"{name}: {there}") from there
        if isinstance(there, BaseException):
            raise there
        if there != str(folder):
            raise AdapterFailed(
                f"{source}: is in {there} for {name}, but in {folder} for rank 0, and an engine "
                f"reads it at one path on all its nodes: give them the same folder, or the same "
                f"HF_HUB_CACHE"
            )
    return folder


def _at_commit(source: str, folder: Path) -> str:
    """The same, now that it is known what of a repository it is; others are folders."""
    is_snapshot = adapter_repo(source) is not None and folder.parent.name == "snapshots"
    return f"{source.partition('@')[0]}@{folder.name}" if is_snapshot else source


async def locate_adapter(
    source: str, cache: ModelCacheSpec, log: Path, tell: Callable[[str], None] = silent
) -> Path:
    """The adapter's folder; one of a Hugging Face repository comes as weights do (`weights.fetch`).

    Raises:
        AdapterFailed: there is none, or it is not an adapter.
    """
    folder = await asyncio.to_thread(_folder, source)
    if folder is None:
        wanted = adapter_repo(source)
        if wanted is None:
            raise AdapterFailed(f"{source}: no such folder on this node")
        try:
            return await weights.fetch(wanted, cache, log, tell)
        except (WeightsMissing, OSError) as error:  # OSError: the cache's disk is full or broken
            raise AdapterFailed(f"{source}: {error}") from error
    return folder


def adapter_repo(source: str) -> Wanted | None:
    """What `source` means on a hub: REPO or REPO@REVISION; None: it can only be a folder."""
    repo, _, revision = source.partition("@")
    if not _REPO.fullmatch(repo):
        return None
    return Wanted(repo, revision or "main", checkpoint_format="lora")


def _folder(source: str) -> Path | None:
    """The one on this node; None: there is none."""
    try:
        folder = Path(source).expanduser()
        if not folder.exists():
            return None
        if not (folder / ADAPTER_CONFIG).is_file():
            raise AdapterFailed(f"{source}: no {ADAPTER_CONFIG} there, so it is no LoRA adapter")
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home (~name)
        raise AdapterFailed(f"{source}: cannot be read: {error}") from error
