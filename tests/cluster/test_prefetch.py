"""Weights come ahead of a roll-out, and again after a failure."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from cluster.errors import WeightsMissing
from cluster.event_log import EventLog
from cluster.prefetch import Prefetch
from placement.plan import Variant
from tests.builders import a_shape, a_variant

NEW = a_variant(checkpoint="someone/Model", shape=a_shape(engine="vllm"), commit="2" * 40)
A, B = ("id-a", "a", "local"), ("id-b", "b", "local")


class Hub:
    """Refuses as often as it is told to, on some nodes."""

    def __init__(self, *refusals: str, crashes: bool = False) -> None:
        self.refusals, self.crashes = list(refusals), crashes
        self.asked: list[str] = []

    async def fetch(self, variant: Variant, node_id: str, tell: Callable[[str], None]) -> None:
        self.asked.append(node_id)
        if self.crashes:
            raise LookupError("a bug")
        if node_id in self.refusals:
            self.refusals.remove(node_id)
            raise WeightsMissing("no answer")


async def a_moment() -> None:
    await asyncio.sleep(0.02)


async def test_what_failed_is_tried_again_after_a_pause():
    hub = Hub("id-a")
    prefetch = Prefetch(hub.fetch, EventLog(Path(os.devnull)), retry_s=(0.1, 0.1))

    assert not prefetch.want([NEW], [A])
    await a_moment()
    assert not prefetch.want([NEW], [A])
    assert (hub.asked, prefetch.failure([NEW])) == (["id-a"], "no answer")
    await asyncio.sleep(0.1)
    prefetch.want([NEW], [A])
    await a_moment()

    assert prefetch.want([NEW], [A])
    assert prefetch.failure([NEW]) == ""


async def test_a_node_that_is_gone_stops_nothing():
    hub = Hub("id-b")
    prefetch = Prefetch(hub.fetch, EventLog(Path(os.devnull)))
    prefetch.want([NEW], [A, B])
    await a_moment()
    assert prefetch.failure([NEW]) == "no answer"

    assert prefetch.want([NEW], [A])
    assert prefetch.failure([NEW]) == ""


async def test_weights_are_not_there_because_bringing_them_broke_off():
    hub = Hub(crashes=True)
    prefetch = Prefetch(hub.fetch, EventLog(Path(os.devnull)))
    prefetch.want([NEW], [A])
    await a_moment()

    assert not prefetch.want([NEW], [A])
