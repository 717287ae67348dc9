"""Controller: the actor that carries out plans, keeps the endpoint table and scales replicas.

Its HTTP API, behind a bearer token, serves gateways (`/v1/sync`) and the command line. Decisions
are taken by `placement.scaling` and `cluster.registry`; here they meet the clock, Serve and sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ray

from cluster import census, serve_apps
from cluster.adapter_events import adapter_events
from cluster.autoscaler import Autoscaler, answering, shared_out
from cluster.calibration_file import CALIBRATION_FILE, calibrated_catalogue
from cluster.control_api import serve_control_api
from cluster.deployer import Deployer
from cluster.event_log import EventLog
from cluster.facts_file import FACTS_FILE
from cluster.files import replace_text
from cluster.gang import Site
from cluster.gateway_host import STOP_S, gateway_actors
from cluster.generations import GenerationKey, key_of, plan_of
from cluster.key_keeper import KeyKeeper
from cluster.lifecycle import Lifecycle
from cluster.messages import (
    Drained,
    DrainRequest,
    EventKind,
    EventList,
    FleetStatus,
    NodeList,
    ReplicaReport,
)
from cluster.names import NAMESPACE
from cluster.observer import Observer
from cluster.pace import Pace
from cluster.publishing import Publisher
from cluster.ray_fetch import RayFetch
from cluster.ray_inventory import ray_inventory
from cluster.ray_survey import RayProbes
from cluster.registry import Registry
from cluster.status import variant_status
from cluster.surveyor import Surveyor
from cluster.sync_desk import SyncDesk
from cluster.weight_events import WeightEvents
from gateway.endpoints import EndpointTable, SyncRequest, SyncResponse
from placement.errors import UnknownName
from placement.inventory import Inventory
from placement.plan import Plan, Variant
from placement.spec import dump_yaml, parse_yaml

SCALE_PERIOD_S = 0.5
LOOK_PERIOD_S = 0.5  # a census costs Serve and the controller some milliseconds each
SETTLE_S = 3.0  # after a restart every replica has sent a heartbeat by then
SETTLE_LONGEST_S = 30.0  # or by then, when Ray's head went down too and finds its nodes again
PLAN_FILE = "plan.yaml"
EVENTS_FILE = "events.jsonl"
SHOWN_EVENTS = 200  # in a status; `bora events` has all

log = logging.getLogger("bora.controller")


class Controller:
    """One per cluster. `run_dir` holds the current plan and engine logs; `token` is the key."""

    def __init__(
        self, run_dir: str, token: str, host: str, port: int, engine_host: str | None = None
    ) -> None:
        self._run_dir = Path(run_dir)
        self._token = token
        self._address = (host, port)
        self._plan: Plan | None = None
        self._registry = Registry()
        self._autoscaler = Autoscaler()
        self._desk = SyncDesk(self._run_dir.parent, self._settling)
        self._publisher = Publisher(self._desk, self._table)
        self._paces = (Pace("scaling"), Pace("census"), Pace("delay"))
        self._events = EventLog(self._run_dir / EVENTS_FILE)
        self._weights = WeightEvents(self._events)
        facts_file = self._run_dir.parent / FACTS_FILE
        catalogue = calibrated_catalogue()
        self._surveyor = Surveyor(RayProbes(), facts_file, catalogue, self._note_node)
        self._observer = Observer(self._run_dir.parent / CALIBRATION_FILE, self._events)
        self._failures: dict[GenerationKey, str] = {}
        self._deployer = Deployer(
            Site(log_dir=str(self._run_dir / "logs"), engine_host=engine_host)
        )
        self._lifecycle = Lifecycle(
            self._registry,
            self._autoscaler,
            self._deployer,
            variants=self._variants,
            events=self._events,
            take=census.take,
            drain_node=census.drain_node,
            fetch=RayFetch(str(self._run_dir / "logs")),
        )
        self._recovered_s = -math.inf  # when (monotonic) this took over from one that died
        self._gateway_failure = ""
        self._loops: list[asyncio.Task[None]] = []
        self._starting = asyncio.Lock()

    async def start(self) -> str:
        """Listen and run the loops; the API's URL. Called again, it only returns the URL.

        A restarted controller takes the plan from disk and the replicas from their heartbeats.
        """
        async with self._starting:
            if not self._loops:
                _log_to(self._run_dir / "logs" / "controller.log")
                await asyncio.to_thread(serve_apps.start)
                await self._recover()
                await serve_control_api(self, *self._address, self._token)
                loops = (self._run_forever, self._look_forever, self._surveyor.run_forever)
                for forever in loops:
                    loop = asyncio.create_task(forever())
                    loop.add_done_callback(end_process_on_failure)
                    self._loops.append(loop)
        host, port = self._address
        return f"http://{host}:{port}"

    async def _recover(self) -> None:
        """After a restart: the plan from disk, the counts from Serve, replicas from heartbeats.

        Where the disk is gone with the head, Serve knows what it was told of the plan.
        """
        served = await self._deployer.deployed()
        plan = await asyncio.to_thread(_kept_plan, self._run_dir / PLAN_FILE) or plan_of(served)
        if plan is None:
            return
        counts = {
            v.variant: served[key].target for v in plan.variants if (key := key_of(v)) in served
        }
        self._autoscaler.restore(counts)
        self._recovered_s = time.monotonic()
        self._adopt(plan, {variant.model for variant in plan.variants})
        await self._reconcile()
        log.info("recovered the fleet %s", plan.fleet)

    async def report(self, text: str) -> float | None:
        """A replica's heartbeat (`ReplicaReport` as JSON).

        The answer tells it within how many seconds to finish and go; None: it serves on.
        """
        await self.start()
        report = ReplicaReport.model_validate_json(text)
        self._weights.heard(time.time(), report)
        adapters_changed = self._note_adapters(report)
        if self._registry.report(report, time.monotonic()):
            self._observer.changed(report.model)
            self._events.replica(time.time(), report)
            self._lifecycle.heard(report)
            key = GenerationKey(report.variant, report.version)
            if report.state == "failed":
                self._failures[key] = report.log_tail or report.stage
            elif report.state == "ready":
                self._failures.pop(key, None)
            self._publish()
            if report.state == "ready":
                await self._observer.ready(report)
        elif adapters_changed:
            self._publish()
        await self._observer.heard(report)
        return self._lifecycle.order_for(report.replica)

    def _note_adapters(self, report: ReplicaReport) -> bool:
        """Tell what a replica has loaded since its last heartbeat; whether there was anything."""
        before = self._registry.get(report.replica)
        found = list(adapter_events(before, report)) if before else []
        for event in found:
            self._events.note(
                time.time(),
                "adapter",
                event.text,
                model=report.model,
                replica=report.replica,
                node=report.node,
                reason=event.reason,
            )
        return bool(found)

    async def sync(self, request: SyncRequest) -> SyncResponse:
        """Take a gateway's load and usage in; answer when it lacks a table or keys."""
        self._autoscaler.observe(request.gateway, request.loads, time.monotonic())
        self._gateway_failure = ""
        return await self._desk.answer(request)

    @property
    def keys(self) -> KeyKeeper:
        """Tenants, keys and usage."""
        return self._desk.keys

    async def gateway_ended(self, log_tail: str) -> None:
        """A gateway process of ours ended by itself."""
        self._gateway_failure = log_tail
        self._note(
            "", "a gateway ended and is started again", kind="gateway", reason=log_tail[-300:]
        )

    async def apply(self, plan: Plan) -> None:
        """Make the cluster serve exactly `plan`; returns when Serve has taken everything over.

        The plan is kept first: should this be cut short, the next start carries on.
        """
        running = {variant.model for variant in self._variants()}
        path = self._run_dir / PLAN_FILE
        await asyncio.to_thread(replace_text, path, dump_yaml(plan))
        self._adopt(plan, running)
        await self._reconcile()

    async def _reconcile(self) -> None:
        assert self._plan is not None  # noqa: S101 - adopted just before
        counts = self._lifecycle.counts(self._plan.variants)
        served = {variant.model for variant in self._plan.variants}
        for model in await self._deployer.reconcile(self._plan, counts):
            kind: EventKind = "deployed" if model in served else "deleted"
            self._note(model, kind, kind=kind)

    async def scale(self, model: str, replicas: int) -> None:
        """Set a model's replica count, until the load says otherwise; its first variant first.

        Of a model whose prompts are read elsewhere: how many answer, and the others follow.

        Raises:
            UnknownName: the fleet has no such model.
            ConfigError: so many, or so few, are outside of its bounds.
        """
        siblings = self._variants_of(model)
        for variant, count in shared_out(answering(siblings), replicas):
            await self._scale(variant, count, "asked for")
        for variant in siblings:
            follows = variant.role == "prefill"
            if follows and (decision := self._autoscaler.follow(variant, siblings)):
                await self._scale(variant, decision.target, decision.reason)

    async def drain(self, request: DrainRequest) -> Drained:
        """Empty a replica or a node."""
        drained = await self._lifecycle.drain(request)
        self._publish()
        return drained

    async def delete(self, model: str) -> None:
        """Take a model out of the fleet.

        Raises:
            UnknownName: the fleet has no such model.
        """
        gone = self._variants_of(model)
        assert self._plan is not None  # noqa: S101 - it has variants
        kept = tuple(variant for variant in self._plan.variants if variant not in gone)
        await self.apply(self._plan.model_copy(update={"variants": kept}))

    async def stop(self) -> None:
        """Let requests finish, then stop gateways and engines; Ray itself goes on."""
        stopping = []
        for name in await asyncio.to_thread(gateway_actors):
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                stopping.append(ray.get_actor(name, namespace=NAMESPACE).stop.remote())
        with contextlib.suppress(TimeoutError):  # of one whose host is away
            together = asyncio.gather(*stopping, return_exceptions=True)
            await asyncio.wait_for(together, STOP_S)
        self._plan = None
        (self._run_dir / PLAN_FILE).unlink(missing_ok=True)
        await self._deployer.stop()

    async def inventory(self) -> Inventory:
        """What the cluster's nodes offer, from their labels and what probes measured there.

        Raises:
            ConfigError: no node carries bora's labels.
        """
        return self._surveyor.corrected(ray_inventory(await asyncio.to_thread(ray.nodes)))

    def nodes(self) -> NodeList:
        """What probes found on the nodes."""
        return self._surveyor.nodes()

    def events(self, after: int) -> EventList:
        """What happened since the event with this number."""
        return EventList(events=self._events.after(after))

    async def plan(self) -> Plan | None:
        """What the cluster serves."""
        return self._plan

    def status(self) -> FleetStatus:
        """What `bora status` shows."""
        now_s = time.time()
        return FleetStatus(
            fleet=self._plan.fleet if self._plan else "",
            table_version=self._desk.table.version,
            variants=tuple(
                variant_status(
                    variant,
                    self._registry.of(variant.variant),
                    ready=self._registry.ready(variant),
                    wanted=self._autoscaler.target(variant) if variant in self._variants() else 0,
                    load=self._autoscaler.load(variant.model, *variant.adapters),
                    events=self._events,
                    failure=self._failures.get(key_of(variant), "")
                    or self._lifecycle.prefetch.failure([variant]),
                    lifecycle=self._lifecycle,
                    speed=self._observer.speed(variant),
                    now_s=now_s,
                )
                for variant in (*self._variants(), *self._replaced())
            ),
            gateways=self._autoscaler.gateways(time.monotonic()),
            gateway_failure=self._gateway_failure,
            events=tuple(self._events)[-SHOWN_EVENTS:],
            loops=tuple(pace.told() for pace in self._paces),
        )

    async def _run_forever(self) -> None:
        scaling, _, delay = self._paces
        due_s = time.monotonic()
        while True:
            due_s += SCALE_PERIOD_S
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            late_s = time.monotonic() - due_s
            delay.took(late_s)
            if late_s > 1.0:  # this process was held up, and heartbeats wait to be read
                self._registry.pardon(late_s)
                due_s = time.monotonic()
            with scaling.round():
                self._expire()
                for variant in self._variants():
                    await self._follow_load(variant)

    async def _look_forever(self) -> None:
        _, census_pace, _ = self._paces
        while True:
            await asyncio.sleep(LOOK_PERIOD_S)
            with census_pace.round():
                act = self._plan is not None and not self._settling()
                changed = await self._lifecycle.look(act=act)
            if changed:
                self._publish()

    def _expire(self) -> None:
        for lost in self._registry.expire(time.monotonic()):
            self._observer.changed(lost.model)
            if lost.state not in ("failed", "draining"):
                self._events.lost(time.time(), lost, "no heartbeat, taken out")
            self._publish()

    async def _follow_load(self, variant: Variant) -> None:
        ready = self._registry.ready(variant)
        siblings = self._variants_of(variant.model)
        decision = self._autoscaler.decide(variant, ready, time.monotonic(), siblings)
        if decision is None:
            return
        try:
            await self._scale(variant, decision.target, decision.reason)
        except (ray.exceptions.RayError, ValueError) as error:
            # Serve is busy or restarting: the next round decides anew from the same state.
            log.warning("scaling %s to %d failed: %s", variant.variant, decision.target, error)

    async def _scale(self, variant: Variant, replicas: int, reason: str) -> None:
        await self._lifecycle.scale(variant, replicas)
        self._publish()
        text = f"{variant.variant}: {replicas} replicas ({reason})"
        self._note(variant.model, text, kind="scaled", reason=reason)

    def _settling(self) -> bool:
        """Until then gateways keep the table that they have."""
        since_s = time.monotonic() - self._recovered_s
        return since_s < SETTLE_S or (since_s < SETTLE_LONGEST_S and self._lifecycle.unheard())

    def _adopt(self, plan: Plan, running: Collection[str]) -> None:
        """Take `plan` for what is wanted; models that are `running` keep their replica counts."""
        self._plan = plan
        self._failures.clear()
        self._lifecycle.forgive()
        self._observer.adopt(plan.variants)
        for variant in plan.variants:
            self._autoscaler.adopt(variant, running=variant.model in running)
        self._publish()

    def _publish(self) -> None:
        """Put the table before all waiting gateways, if anything in it differs."""
        self._publisher.changed()

    def _table(self, version: int, changed_s: float) -> EndpointTable:
        outgoing = self._lifecycle.outgoing()
        table = self._registry.table(self._variants(), version, outgoing=outgoing)
        return table.model_copy(update={"changed_s": changed_s})

    def _note(self, model: str, text: str, *, kind: EventKind = "note", reason: str = "") -> None:
        self._events.note(time.time(), kind, text, model=model, reason=reason)

    def _note_node(self, kind: EventKind, node: str, text: str) -> None:
        self._events.note(time.time(), kind, text, node=node)

    def _variants(self) -> tuple[Variant, ...]:
        return self._plan.variants if self._plan else ()

    def _replaced(self) -> list[Variant]:
        """Variants that still serve although the plan no longer names them."""
        named = {variant.variant for variant in self._variants()}
        return [each for each in self._lifecycle.outgoing() if each.variant not in named]

    def _variants_of(self, model: str) -> list[Variant]:
        found = [variant for variant in self._variants() if variant.model == model]
        if not found:
            raise UnknownName("model", model, {variant.model for variant in self._variants()})
        return found


def _kept_plan(path: Path) -> Plan | None:
    if not path.exists():
        return None
    return parse_yaml(path.read_text(encoding="utf-8"), Plan, source=str(path))


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("bora").addHandler(handler)
    logging.getLogger("bora").setLevel(logging.INFO)


def end_process_on_failure(task: asyncio.Task[Any]) -> None:
    """A task that must not end has failed: end the actor; Ray starts it anew and it recovers."""
    if not task.cancelled() and task.exception() is not None:
        log.critical("the controller failed", exc_info=task.exception())
        os._exit(1)
