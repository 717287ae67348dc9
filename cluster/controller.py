"""Controller: the actor's inside: the fleet, what gateways are told, and what commands ask.

Its HTTP API, behind a bearer token, serves gateways (`/v1/sync`) and the command line. How a plan is
carried out is `cluster.fleet`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import ray

from cluster import serve_apps
from cluster.calibration_file import calibrated_catalogue
from cluster.context import Context, save_where_missing
from cluster.control_api import serve_control_api
from cluster.event_log import EventLog
from cluster.facts_file import FACTS_FILE
from cluster.fleet import Fleet
from cluster.gateway_host import STOP_S, gateway_actors
from cluster.key_keeper import KeyKeeper
from cluster.messages import (
    EventKind,
    EventList,
    FleetStatus,
    LogPart,
    LogQuery,
    NodeList,
    Orders,
    ReplicaReport,
)
from cluster.names import NAMESPACE
from cluster.node_logs import NodeLogs
from cluster.publishing import Publisher
from cluster.ray_inventory import ray_inventory
from cluster.ray_survey import RayProbes
from cluster.surveyor import Surveyor
from cluster.sync_desk import SyncDesk
from gateway.endpoints import SyncRequest, SyncResponse
from placement.inventory import Inventory
from placement.plan import Plan

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
        self._events = EventLog(self._run_dir / EVENTS_FILE)
        self.fleet = Fleet(self._run_dir, engine_host, self._events, self._publish)
        self._desk = SyncDesk(self._run_dir.parent, self.fleet.settling)
        self._publisher = Publisher(self._desk, self.fleet.table)
        self._node_logs = NodeLogs(self._run_dir / "logs")
        facts_file = self._run_dir.parent / FACTS_FILE
        catalogue = calibrated_catalogue()
        self._surveyor = Surveyor(RayProbes(), facts_file, catalogue, self._note_node)
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
                if await self.fleet.recover():
                    self._save_context()
                copy = self.fleet.plans.copy
                if copy:
                    self._desk.keys.changed = copy.nudge
                await serve_control_api(self, *self._address, self._token)
                loops = [*self.fleet.loops(), self._surveyor.run_forever()]
                loops += [copy.run_forever()] if copy else []
                for forever in loops:
                    loop = asyncio.create_task(forever)
                    loop.add_done_callback(end_process_on_failure)
                    self._loops.append(loop)
        host, port = self._address
        return f"http://{host}:{port}"

    def _save_context(self) -> None:
        """Commands on a head that lost its disk find this controller again."""
        found = Context(
            run_dir=str(self._run_dir),
            ray_address=ray.get_runtime_context().gcs_address,
            controller_url="http://{}:{}".format(*self._address),
            token=self._token,
        )
        if save_where_missing(found):
            text = "the file by which commands find the controller is here again"
            self._events.note(time.time(), "note", text)

    async def report(self, text: str) -> Orders:
        """A replica's heartbeat (`ReplicaReport` as JSON)."""
        await self.start()
        return await self.fleet.heartbeats.take(ReplicaReport.model_validate_json(text))

    async def sync(self, request: SyncRequest) -> SyncResponse:
        """Take a gateway's load and usage in; answer when it lacks a table or keys."""
        self.fleet.autoscaler.observe(request.gateway, request.loads, time.monotonic())
        self._gateway_failure = ""
        return await self._desk.answer(request)

    @property
    def keys(self) -> KeyKeeper:
        """Tenants, keys and usage."""
        return self._desk.keys

    async def gateway_ended(self, log_tail: str) -> None:
        """A gateway process of ours ended by itself."""
        self._gateway_failure = log_tail
        text = "a gateway ended and is started again"
        self._events.note(time.time(), "gateway", text, reason=log_tail[-300:])

    async def stop(self) -> None:
        """Let requests finish, then stop gateways and engines; Ray itself goes on."""
        stopping = []
        for name in await asyncio.to_thread(gateway_actors):
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                stopping.append(ray.get_actor(name, namespace=NAMESPACE).stop.remote())
        with contextlib.suppress(TimeoutError):  # of one whose host is away
            together = asyncio.gather(*stopping, return_exceptions=True)
            await asyncio.wait_for(together, STOP_S)
        await self.fleet.stop()

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

    async def logs(self, query: LogQuery) -> LogPart:
        """A part of a log, from the node that it lies on."""
        return await self._node_logs.read(query)

    async def plan(self) -> Plan | None:
        """What the cluster serves."""
        return self.fleet.plans.current

    def status(self) -> FleetStatus:
        """What `bora status` shows."""
        plan = self.fleet.plans.current
        return FleetStatus(
            fleet=plan.fleet if plan else "",
            table_version=self._desk.table.version,
            variants=self.fleet.variants(),
            gateways=self.fleet.autoscaler.gateways(time.monotonic()),
            gateway_failure=self._gateway_failure,
            events=tuple(self._events)[-SHOWN_EVENTS:],
            loops=self.fleet.loop_times(),
        )

    def _publish(self) -> None:
        """Put the table before all waiting gateways, if anything in it differs."""
        self._publisher.changed()

    def _note_node(self, kind: EventKind, node: str, text: str) -> None:
        self._events.note(time.time(), kind, text, node=node)


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
