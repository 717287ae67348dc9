"""Where a LoRA adapter's files are on this node: in a folder of its own, or in the model cache."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

from cluster import weights
from cluster.errors import AdapterFailed, WeightsMissing
from cluster.model_cache import Wanted, silent
from cluster.weight_files import ADAPTER_CONFIG
from placement.model_cache import ModelCacheSpec

_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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
        except WeightsMissing as error:
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
