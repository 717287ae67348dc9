"""Replica: a Ray Serve replica that owns one engine process, and lives and dies with it.

Requests do not pass through it: gateways talk to the engine's port. It starts the engine, reports
to the controller about every second, drains it when Serve stops the replica, and ends itself at once
when the engine ends, so that Serve starts another. Where the engine has ranks on several nodes, it
leads a gang of actors there (`cluster.gang`), and any fault of the gang is its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve

from cluster import weights
from cluster.controller_link import UNREACHABLE, ControllerLink
from cluster.errors import ClusterError, EngineFailed
from cluster.gang import Gang, places_of
from cluster.gang_start import unless_fault
from cluster.messages import Orders, ReplicaReport, ReplicaState
from cluster.running_engine import RunningEngine, engine_for
from cluster.seat import my_seat, with_gpus
from cluster.serving_features import ServingFeatures
from cluster.shape_version import shape_version
from cluster.site import Site
from cluster.speed_meter import SpeedMeter
from placement.plan import Variant

DRAIN_TIMEOUT_S = 600.0  # a stream may be long; `bora down` has ended all of them before
SUSPECT_CHECKS = 2  # failed in a row, each of up to 2.5 s: then the endpoint leaves the table
DEAD_CHECKS = 6  # in a row: then the engine is ended and started anew


class Replica:
    """One copy of the variant that `reconfigure` is given."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._seat = my_seat()
        self._id = serve.get_replica_context().replica_id.unique_id
        self._state: ReplicaState = "starting"
        self._started_s = time.time()
        self._numbers = itertools.count(1)
        self._variant: Variant | None = None
        self._version = ""
        self._features = ServingFeatures()
        self._link = ControllerLink()
        self._orders = Orders()
        self._failure = ""
        self._engine: RunningEngine | None = None
        self._meter = SpeedMeter()
        self._gang: Gang | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._draining: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Start the engine; Serve awaits this before the replica counts as running.

        Called again when only what the engine does not depend on has changed (aliases, bounds).
        """
        variant = Variant.model_validate(user_config)
        started = self._variant is not None
        self._variant = variant
        if started:
            self._features.want(variant)
            return
        self._version = shape_version(variant)
        self._engine = engine_for(
            variant,
            host=self._site.host(),
            log=self._site.log(variant, self._id),
        )
        if variant.shape.num_nodes > 1:
            self._gang = Gang(self._site, variant, self._id, self._seat)
        reporting = asyncio.create_task(self._report_forever())
        reporting.add_done_callback(self._watch_ended)
        self._tasks.append(reporting)
        try:
            await self._start(variant, self._engine)
        # Whatever it is, this replica ends, and the controller must be able to tell why.
        except Exception as error:
            await self._fail(error, self._engine)
            raise
        await self._follow_features(self._engine, variant)
        self._state = "ready"
        await self._report()
        watch = asyncio.create_task(self._watch_forever())
        watch.add_done_callback(self._watch_ended)
        self._tasks.append(watch)

    async def _start(self, variant: Variant, engine: RunningEngine) -> None:
        """Start the engine, in a gang once all of its nodes are ready to."""
        if self._gang is None:
            checkpoint = await self._prepared(variant, engine)
            await engine.start(checkpoint, self._seat.devices)
            return
        engine.stage = "assembling the gang"
        await self._gang.assemble()
        lead = self._lead(self._gang, variant, engine)
        await unless_fault(lead, partial(self._gang.fault, engine), lambda: engine.ended)

    async def _prepared(self, variant: Variant, engine: RunningEngine) -> Path | str:
        """The checkpoint; the GPUs are held."""
        engine.stage = "waiting for weights"
        checkpoint = await weights.bring(variant, engine.log, engine.note_stage)
        self._seat = await asyncio.to_thread(with_gpus, self._seat, variant, self._id)
        return checkpoint

    async def _lead(self, gang: Gang, variant: Variant, engine: RunningEngine) -> None:
        # All nodes at once: of large weights each may take an hour.
        checkpoint, _ = await asyncio.gather(self._prepared(variant, engine), gang.prepare())
        rank = await gang.launch()
        await engine.start(checkpoint, self._seat.devices, rank)
        engine.facts = await gang.facts(engine.facts)

    async def _fail(self, error: Exception, engine: RunningEngine) -> None:
        """Tell why, in the engine's own last words where it ended by itself; leave nothing behind."""
        if self._draining is not None:  # it was told to go, and its start ends by that
            await self._draining
            return
        ended = isinstance(error, EngineFailed) and engine.ended and not self._gang
        self._failure = "" if ended else _told(error)
        self._state = "failed"
        await self._report()
        await asyncio.to_thread(engine.kill)
        if self._gang:
            await self._gang.end()

    async def check_health(self) -> None:
        """For Serve, every second.

        Raises:
            EngineFailed: the engine has ended.
        """
        if self._engine and self._engine.ended:
            raise EngineFailed(f"{self._id}: the engine has ended")

    async def __del__(self) -> None:
        """Serve calls this when it stops the replica: finish what runs, then end the engine."""
        await self._drained(DRAIN_TIMEOUT_S)

    async def _retire(self, timeout_s: float) -> None:
        """The controller chose this replica to go: Serve itself takes no such wish."""
        await self._drained(timeout_s)
        os._exit(0)

    async def _drained(self, timeout_s: float) -> None:
        """Finish what runs, end the engine and say so; begun only once."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain(timeout_s))
        await self._draining

    async def _drain(self, timeout_s: float) -> None:
        if self._engine and self._state in ("ready", "unhealthy"):
            self._state = "draining"
            await self._report()
            await self._finish(self._engine, timeout_s)
        for task in self._tasks:
            task.cancel()
        if self._engine:
            await asyncio.to_thread(self._engine.stop)
            if self._gang:
                await self._gang.end()
            self._state = "stopped"
            await self._report()

    async def _finish(self, engine: RunningEngine, timeout_s: float) -> None:
        """Until nothing runs. A gang that has lost a rank answers nothing that it has begun."""
        if self._gang is None:
            await engine.drained(timeout_s)
            return
        try:
            fault = partial(self._gang.fault, engine)
            await unless_fault(engine.drained(timeout_s), fault, lambda: False)
        except EngineFailed as error:
            self._failure = str(error)  # it ends all the same, and its last report tells why

    async def _report_forever(self) -> None:
        while True:
            await self._report()
            await asyncio.sleep(self._orders.next_report_s)

    async def _watch_forever(self) -> None:
        """Follow the engine's health; end this process when the engine is gone."""
        assert self._engine is not None  # noqa: S101 - started by reconfigure, after the engine
        failures = 0
        while self._state in ("ready", "unhealthy"):
            healthy = await self._engine.observe()
            failures = 0 if healthy else failures + 1
            if healthy:
                self._meter.note(self._engine.load, time.monotonic())
            else:
                self._meter.interrupt()
            if fault := self._gang.fault(self._engine) if self._gang else "":
                self._failure = fault
            if self._engine.ended or fault or failures >= DEAD_CHECKS:
                self._die()
            await self._note_health(healthy=failures < SUSPECT_CHECKS)
            await asyncio.sleep(0.5)

    def _watch_ended(self, task: asyncio.Task[None]) -> None:
        """A bug there must not leave an engine unwatched: a new replica starts over."""
        if not task.cancelled() and task.exception() is not None:
            logging.getLogger("ray.serve").critical("watching failed", exc_info=task.exception())
            self._die()

    async def _follow_features(self, engine: RunningEngine, variant: Variant) -> None:
        engine.stage = "loading adapters" if variant.adapters else ""
        task = await self._features.start(
            variant,
            url=engine.url,
            api_key=engine.api_key,
            log=engine.log,
            others=self._gang.elsewhere() if self._gang else {},
            changed=self._report,
        )
        engine.stage = ""
        task.add_done_callback(self._watch_ended)
        self._tasks.append(task)

    async def _note_health(self, *, healthy: bool) -> None:
        state: ReplicaState = "ready" if healthy else "unhealthy"
        if self._state not in ("draining", state):
            self._state = state
            await self._report()

    def _die(self) -> None:
        """Tell the controller, then end this process: Serve replaces a dead replica at once."""
        self._state = "failed"
        self._link.report_last(self._snapshot().model_dump_json())
        if self._gang:
            self._gang.end_now()
        if self._engine:
            self._engine.kill()
        os._exit(1)

    async def _report(self) -> None:
        """Best effort: the controller may be restarting, and the next heartbeat comes soon."""
        with contextlib.suppress(*UNREACHABLE):
            self._orders = await self._link.report(self._snapshot().model_dump_json())
            retire_within_s = self._orders.retire_within_s
            if retire_within_s is not None and self._retiring is None:
                self._retiring = asyncio.create_task(self._retire(retire_within_s))

    def _snapshot(self) -> ReplicaReport:
        engine, variant = self._engine, self._variant
        assert engine is not None  # noqa: S101 - reports start after both are set
        assert variant is not None  # noqa: S101
        return ReplicaReport(
            replica=self._id,
            model=variant.model,
            variant=variant.variant,
            version=self._version,
            state=self._state,
            stage=engine.stage,
            started_s=self._started_s,
            number=next(self._numbers),
            node=self._seat.host,
            node_id=self._seat.node_id,
            gpus=self._seat.gpus,
            num_devices=self._seat.num_devices,
            followers=places_of(self._gang.places) if self._gang else (),
            pid=engine.pid,
            url=engine.url,
            api_key=engine.api_key,
            log_file=str(engine.log),
            log_tail=self._failure or (engine.log_tail() if self._state == "failed" else ""),
            running=engine.load.running,
            waiting=engine.load.waiting,
            kv_cache_usage=engine.load.kv_cache_usage,
            kv_cache_tokens=engine.facts.kv_cache_tokens,
            weights_bytes=engine.facts.weights_bytes,
            speed=self._meter.window,
            **self._features.report(),
        )


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ClusterError) else repr(error)
