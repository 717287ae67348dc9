"""Weights: brings a checkpoint to this node before an engine needs it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path

from cluster import checkpoints
from cluster.errors import WeightsMissing
from cluster.fetch_weights import FOUND, TELLS, FetchOrder
from cluster.model_cache import ModelCache, Wanted, silent
from cluster.processes import start_guarded, stop_guarded, tail
from placement.model_cache import ModelCacheSpec
from placement.plan import Variant

_COMMIT = re.compile(r"[0-9a-f]{40}")
_POLL_S = 0.2
_SHOWN_LINES = 10


async def bring(variant: Variant, log: Path, tell: Callable[[str], None] = silent) -> Path | str:
    """What the variant's engine is given as its checkpoint, on this node by now.

    It stays there while this process lives. A process of its own fetches it, which ends with this
    one; its output is appended to `log`, and `tell` is given what it does.

    Raises:
        WeightsMissing: it cannot be had.
    """
    wanted = checkpoints.to_download(variant)
    if wanted is None:
        return await asyncio.to_thread(checkpoints.locate, variant)
    snapshot = await fetch(wanted, variant.model_cache, log, tell)
    return checkpoints.in_snapshot(wanted, snapshot)


async def fetch(
    wanted: Wanted, settings: ModelCacheSpec, log: Path, tell: Callable[[str], None] = silent
) -> Path:
    """The folder that holds `wanted` on this node, for as long as this process lives; as `bring`.

    Raises:
        WeightsMissing: it cannot be had.
    """
    cache = ModelCache(hub=None)
    pinned = wanted.commit or _COMMIT.fullmatch(wanted.revision)
    snapshot = await asyncio.to_thread(cache.find, wanted) if pinned else None
    while snapshot is None or not cache.keep(wanted, snapshot):
        snapshot = await _fetched(wanted, settings, log, tell)
    return snapshot


async def _fetched(
    wanted: Wanted, settings: ModelCacheSpec, log: Path, tell: Callable[[str], None]
) -> Path:
    order = FetchOrder(
        repo=wanted.repo,
        revision=wanted.revision,
        commit=wanted.commit,
        checkpoint_format=wanted.checkpoint_format,
        precision=wanted.precision,
        cache=settings,
    )
    command = [sys.executable, "-m", "cluster.fetch_weights", order.model_dump_json()]
    _, read = _new_lines(log, 0)
    process = start_guarded(command, log=log, grace_s=1.0)
    last = ""
    try:
        running = True
        while running:
            await asyncio.sleep(_POLL_S)
            running = process.poll() is None  # what it wrote before is read in this round
            lines, read = _new_lines(log, read)
            for line in lines:
                if line.startswith(TELLS):
                    last = line.removeprefix(TELLS)
                    tell("" if last.startswith(FOUND) else last)
    finally:
        await asyncio.to_thread(stop_guarded, process)
    if process.returncode != 0 or not last.startswith(FOUND):
        why = last if process.returncode == 1 and last else tail(log, _SHOWN_LINES)
        raise WeightsMissing(f"the weights cannot be fetched: {why}")
    return Path(last.removeprefix(FOUND))


def _new_lines(log: Path, start: int) -> tuple[list[str], int]:
    """Whole lines from byte `start` on, and where the next one begins."""
    if not log.exists():
        return [], start
    with log.open("rb") as file:
        file.seek(start)
        text = file.read()
    whole = text.rfind(b"\n") + 1
    return text[:whole].decode(errors="replace").splitlines(), start + whole
