"""Replica counts follow the load, whatever else happens meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

from cluster.autoscaler import Autoscaler
from cluster.departures import Departures
from cluster.event_log import EventLog
from cluster.generations import GenerationKey, key_of
from cluster.registry import Registry
from cluster.scaling_loop import ScalingLoop
from gateway.endpoints import ModelLoad
from placement.fleet import ReplicaBounds
from placement.plan import Variant
from tests.builders import a_variant


class Busy:
    """Serve, during whose answer another plan comes."""

    def __init__(self, *variants: Variant, later: tuple[Variant, ...]) -> None:
        self.variants, self._later = variants, later
        self.scaled: list[tuple[GenerationKey, int]] = []

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        self.scaled.append((key, replicas))
        self.variants = self._later


async def test_a_model_that_is_deleted_while_another_is_scaled_is_left_alone():
    bounds = ReplicaBounds(min=0, max=4)
    stays, goes = (
        a_variant(model=name, variant=f"{name}@sim", bounds=bounds, replicas=0)
        for name in ("stays", "goes")
    )
    serve = Busy(stays, goes, later=(stays,))
    autoscaler, registry, events = Autoscaler(), Registry(), EventLog(Path(os.devnull))
    departures = Departures(
        registry, autoscaler, serve, events, nodes=dict, drain_node=lambda *_: None
    )
    loop = ScalingLoop(
        autoscaler,
        registry,
        departures,
        events,
        variants=lambda: serve.variants,
        changed=lambda: None,
    )
    waiting = ModelLoad(in_flight=0.0, queued=9, requests_total=1)
    autoscaler.observe("gateway", {"stays": waiting, "goes": waiting}, time.monotonic())

    await loop.follow_load()

    assert [key for key, _ in serve.scaled] == [key_of(stays)]
