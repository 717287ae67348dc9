"""Fleet: what carries a plan out, put together: the parts by which replicas come, scale and go."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path

import ray

from cluster import census, held_rooms
from cluster.autoscaler import Autoscaler
from cluster.calibration_file import CALIBRATION_FILE
from cluster.deployer import Deployer
from cluster.errors import ClusterError
from cluster.event_log import EventLog
from cluster.gcs_values import GcsValues
from cluster.generations import key_of
from cluster.heartbeats import Heartbeats
from cluster.lifecycle import Lifecycle
from cluster.messages import Drained, DrainRequest, EventKind, LoopTime, VariantStatus
from cluster.observer import Observer
from cluster.pace import Pace
from cluster.plan_keeper import PlanKeeper
from cluster.ray_fetch import RayFetch
from cluster.registry import Registry
from cluster.scaling_loop import ScalingLoop
from cluster.site import Site
from cluster.status import variant_status
from gateway.endpoints import EndpointTable
from placement.plan import Plan, Variant

LOOK_PERIOD_S = 0.5  # a census costs Serve and the controller some milliseconds each
SETTLE_S = 3.0  # after a restart every replica has sent a heartbeat by then
SETTLE_LONGEST_S = 30.0  # or by then, when Ray's head went down too and finds its nodes again

log = logging.getLogger("bora.controller")


class Fleet:
    """Models that serve. `run_dir` holds the plan and engine logs.

    `engine_host`: where engines listen; None: on their node's address. `changed()` is called when
    endpoints may differ.
    """

    def __init__(
        self,
        run_dir: Path,
        engine_host: str | None,
        events: EventLog,
        changed: Callable[[], None],
    ) -> None:
        log_dir = str(run_dir / "logs")
        self._events = events
        self._changed = changed
        self.plans = PlanKeeper(run_dir)
        self.autoscaler = Autoscaler()
        self._registry = Registry()
        self._deployer = Deployer(Site(log_dir=log_dir, engine_host=engine_host), GcsValues())
        self._lifecycle = Lifecycle(
            self._registry,
            self.autoscaler,
            self._deployer,
            variants=self.plans.variants,
            events=events,
            take=census.take,
            drain_node=census.drain_node,
            fetch=RayFetch(log_dir),
            rooms=held_rooms,
        )
        self._observer = Observer(run_dir.parent / CALIBRATION_FILE, events)
        self.heartbeats = Heartbeats(
            self._registry, self._lifecycle, self._observer, events, changed
        )
        self._scaling = ScalingLoop(
            self.autoscaler,
            self._registry,
            self._lifecycle.departures,
            events,
            variants=self.plans.variants,
            changed=changed,
        )
        self._census_pace = Pace("census")
        self._recovered_s = -math.inf  # when (monotonic) this took over from one that died

    async def recover(self) -> bool:
        """After a restart: the plan from disk, the counts from Serve, replicas from heartbeats.

        Where the disk is gone with the head, Redis has a copy, and without one Serve knows what it
        was told of the plan. False: there was none.
        """
        served = await self._deployer.deployed()
        for text in await self.plans.restore():
            self._note("", "note", f"restored from Redis: {text}")
        plan = await self.plans.kept(served)
        if plan is None:
            return False
        counts = {
            v.variant: served[key].target for v in plan.variants if (key := key_of(v)) in served
        }
        self.autoscaler.restore(counts)
        self._recovered_s = time.monotonic()
        self._adopt(plan, {variant.model for variant in plan.variants})
        await self._reconcile(plan)
        log.info("recovered the fleet %s", plan.fleet)
        return True

    def loops(self) -> list[Coroutine[None, None, None]]:
        """What runs for as long as the controller does."""
        return [self._scaling.run_forever(self.heartbeats.expire), self._look_forever()]

    async def apply(self, plan: Plan) -> None:
        """Make the cluster serve exactly `plan`; returns when Serve has taken everything over.

        The plan is kept first: should this be cut short, the next start carries on.
        """
        await self.plans.keep(plan)
        async with self._lifecycle.acting:
            running = {variant.model for variant in self.plans.variants()}
            self._adopt(plan, running)
            await self._reconcile(plan)

    def _adopt(self, plan: Plan, running: Collection[str]) -> None:
        """Take `plan` for what is wanted; models that are `running` keep their replica counts."""
        self.plans.current = plan
        self.heartbeats.forgive()
        self._lifecycle.rollouts.forgive()
        self._observer.adopt(plan.variants)
        for variant in plan.variants:
            self.autoscaler.adopt(variant, running=variant.model in running)
        self._changed()

    async def _reconcile(self, plan: Plan, *, again: bool = True) -> None:
        counts = self._lifecycle.departures.counts(plan.variants)
        served = {variant.model for variant in plan.variants}
        for model in await self._deployer.reconcile(plan, counts, again=again):
            kind: EventKind = "deployed" if model in served else "deleted"
            self._note(model, kind, kind)

    async def scale(self, model: str, replicas: int) -> None:
        """Set a model's replica count, until the load says otherwise.

        Raises:
            UnknownName: the fleet has no such model.
            ConfigError: so many, or so few, are outside of its bounds.
        """
        await self._scaling.set(self.plans.of(model), replicas)

    async def drain(self, request: DrainRequest) -> Drained:
        """Empty a replica or a node; see `Departures.drain`."""
        drained = await self._lifecycle.departures.drain(request)
        self._changed()
        return drained

    async def delete(self, model: str) -> None:
        """Take a model out of the fleet.

        Raises:
            UnknownName: the fleet has no such model.
        """
        gone, plan = self.plans.of(model), self.plans.current
        assert plan is not None  # noqa: S101 - it has variants
        kept = tuple(variant for variant in plan.variants if variant not in gone)
        await self.apply(plan.model_copy(update={"variants": kept}))

    async def stop(self) -> None:
        """End all engines and forget the plan."""
        async with self._lifecycle.acting:
            await self.plans.forget()
            await self._deployer.stop()

    def table(self, version: int) -> EndpointTable:
        """What gateways route to now."""
        outgoing = self._lifecycle.outgoing()
        return self._registry.table(self.plans.variants(), version, outgoing=outgoing)

    def settling(self) -> bool:
        """Whether replicas may live that a restarted controller has not heard yet."""
        since_s = time.monotonic() - self._recovered_s
        return since_s < SETTLE_S or (since_s < SETTLE_LONGEST_S and self._lifecycle.unheard())

    def variants(self) -> tuple[VariantStatus, ...]:
        """What `bora status` shows of them."""
        wanted = self.plans.variants()
        named = {variant.variant for variant in wanted}
        replaced = [each for each in self._lifecycle.outgoing() if each.variant not in named]
        return (
            *(self._status(each, self.autoscaler.target(each)) for each in wanted),
            *(self._status(each, 0) for each in replaced),  # they serve on, unnamed
        )

    def _status(self, variant: Variant, wanted: int) -> VariantStatus:
        fetching = self._lifecycle.rollouts.prefetch
        return variant_status(
            variant,
            self._registry.of(variant.variant),
            ready=self._registry.ready(variant),
            wanted=wanted,
            load=self.autoscaler.load(variant.model, *variant.adapters),
            events=self._events,
            failure=self.heartbeats.failure(variant) or fetching.failure([variant]),
            lifecycle=self._lifecycle,
            speed=self._observer.speed(variant),
            now_s=time.time(),
        )

    def loop_times(self) -> tuple[LoopTime, ...]:
        """How long the rounds of the loops take."""
        scaling, delay = self._scaling.paces
        return tuple(pace.told() for pace in (scaling, self._census_pace, delay))

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_PERIOD_S)
            with self._census_pace.round():
                act = self.plans.current is not None and not self.settling()
                changed = await self._lifecycle.look(act=act)
            if changed:
                self._changed()
            if act and self._lifecycle.absent():
                await self._complete()

    async def _complete(self) -> None:
        """Deploy again what Serve did not take over, or has lost."""
        async with self._lifecycle.acting:
            plan = self.plans.current
            try:
                if plan is not None:
                    await self._reconcile(plan, again=False)
            except (ray.exceptions.RayError, ClusterError, ValueError) as error:
                log.warning("Serve takes no deployment now: %r", error)  # the next census comes

    def _note(self, model: str, kind: EventKind, text: str) -> None:
        self._events.note(time.time(), kind, text, model=model)
