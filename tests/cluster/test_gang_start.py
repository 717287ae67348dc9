"""A gang's start is given up as soon as one of its ranks cannot come up, and the cause is told."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import EngineFailed
from cluster.gang_start import unless_fault


async def never() -> None:
    await asyncio.Event().wait()


async def test_a_start_that_comes_to_its_end_needs_nothing_more():
    done = []

    async def start() -> None:
        await asyncio.sleep(0)
        done.append(True)

    await unless_fault(start(), lambda: "", lambda: False)

    assert done


async def test_while_a_node_still_downloads_the_death_of_another_ends_the_start():
    cancelled = asyncio.Event()

    async def download() -> None:
        try:
            await never()
        finally:
            cancelled.set()

    said = iter(["", "rank 2 on c is gone"])
    with pytest.raises(EngineFailed, match="rank 2 on c is gone"):
        await unless_fault(download(), lambda: next(said), lambda: False)
    await asyncio.wait_for(cancelled.wait(), 60)


async def test_the_rank_that_died_first_is_told_although_the_leaders_engine_dies_of_it():
    async def start() -> None:
        raise EngineFailed("rank 0: connection reset by peer")

    said = iter(["", "", "rank 1 on b ended with status -9"])
    with pytest.raises(EngineFailed, match="rank 1 on b ended with status -9"):
        await unless_fault(start(), lambda: next(said), lambda: True)


async def test_an_engine_that_ends_by_itself_is_told_with_its_own_words():
    async def start() -> None:
        raise EngineFailed("no such flag")

    with pytest.raises(EngineFailed, match="no such flag"):
        await unless_fault(start(), lambda: "", lambda: True, cause_s=0.01)
    with pytest.raises(EngineFailed, match="no such flag"):
        await unless_fault(start(), lambda: "", lambda: False)
