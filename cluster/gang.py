"""Gang: an engine with ranks on several nodes, an actor on each; the replica leads, others follow.

Each follower holds its node's GPUs and its share of the engine. It ends when its engine does, when
the leader's actor does (Ray ends what a dead actor owns), and when the leader has not asked after it
for `LEASE_S`: cut off from the cluster it must not hold GPUs that a successor is given.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import weights
from cluster.engine_process import EngineProcess
from cluster.engines.adapter import EngineFacts, Rank
from cluster.engines.kinds import ENGINES
from cluster.errors import EngineFailed
from cluster.gang_state import GangWatch, RankState
from cluster.generations import bundles
from cluster.messages import RankPlace
from cluster.names import log_folder
from cluster.processes import free_ports
from cluster.running_engine import RunningEngine
from cluster.seat import Seat, interface_of, my_seat, with_gpus
from placement.plan import Variant

LEASE_S = 30.0
JOIN_TIMEOUT_S = 60.0  # for a follower's actor to come up: its place has been reserved before
_ASK_PERIOD_S = 0.5
_END_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Site:
    """What replicas need to know of the place: where engines listen and where their logs go."""

    log_dir: str
    engine_host: str | None = None  # None: the node's address

    def host(self) -> str:
        """Address of this node that engines listen on."""
        return self.engine_host or str(ray.util.get_node_ip_address())

    def log(self, variant: Variant, name: str) -> Path:
        """Of the engine of a replica, or of a rank of it, called `name`."""
        return Path(self.log_dir) / log_folder(variant.model) / f"{name}.log"


class GangFollower:
    """A node's share of a replica's engine. `rank` is its place in the gang, from 1 on."""

    def __init__(self, site: Site, variant: str, replica: str, rank: int) -> None:
        self._site = site
        self._variant = Variant.model_validate_json(variant)
        self._name = f"{replica}-rank{rank}"
        self._rank = rank
        self._seat = my_seat()
        self._engine = EngineProcess(
            ENGINES[self._variant.shape.engine],
            self._variant,
            host=site.host(),
            log=site.log(self._variant, self._name),
        )
        self._asked_s = time.monotonic()
        self._lease = asyncio.get_event_loop().create_task(self._end_when_forgotten())

    async def place(self) -> str:
        """Which node it is on (`RankPlace` as JSON)."""
        return self._place().model_dump_json()

    async def prepare(self) -> None:
        """Hold the GPUs and have the weights here, so that all ranks can start at once."""
        self._seat = await asyncio.to_thread(with_gpus, self._seat, self._variant, self._name)
        self._checkpoint = await weights.bring(
            self._variant, self._engine.log, self._engine.note_stage
        )

    async def launch(
        self, num_nodes: int, master_host: str, master_port: int, rpc_port: int
    ) -> None:
        """Start this node's share; returns at once."""
        host = self._site.host()
        here = (host, interface_of(host))
        rank = Rank(self._rank, num_nodes, master_host, master_port, *here, rpc_port)
        self._engine.launch(self._checkpoint, self._seat.devices, rank)

    async def state(self) -> str:
        """How far it is (`RankPlace` as JSON); the leader asks often, or the follower ends."""
        self._asked_s = time.monotonic()
        self._engine.follow_log()
        return self._place().model_dump_json()

    async def facts(self) -> EngineFacts:
        """What this node's share has told of its memory."""
        self._engine.read_facts()
        return self._engine.facts

    async def end(self) -> None:
        """End the engine at once."""
        await asyncio.to_thread(self._engine.kill)

    def _place(self) -> RankPlace:
        status = self._engine.status
        return RankPlace(
            node=self._seat.host,
            node_id=self._seat.node_id,
            gpus=self._seat.gpus,
            num_devices=self._seat.num_devices,
            pid=self._engine.pid,
            stage=self._engine.stage,
            status=status,
            log_file=str(self._engine.log),
            log_tail="" if status is None else self._engine.log_tail(),
        )

    async def _end_when_forgotten(self) -> None:
        left_s = LEASE_S
        while left_s > 0:
            await asyncio.sleep(left_s)
            left_s = self._asked_s + LEASE_S - time.monotonic()
        await asyncio.to_thread(self._engine.kill)
        os._exit(1)


class Gang:
    """The followers of a replica, seen from the leader; all are in the replica's placement group."""

    def __init__(self, site: Site, variant: Variant, replica: str, seat: Seat) -> None:
        self._site = site
        self._variant = variant
        self._replica = replica
        self._seat = seat
        self._followers: list[Any] = []
        self._watch: GangWatch | None = None
        self._ranks: list[RankState] = []
        self._asking: list[asyncio.Task[None]] = []
        self.places: list[RankPlace] = []

    async def assemble(self) -> None:
        """Have an actor on each of the other nodes, with its GPUs and weights at hand.

        Raises:
            EngineFailed: one does not come up, or cannot have them.
        """
        group = ray.util.get_current_placement_group()
        self._followers = [
            _follower(group, number, bundle).remote(
                self._site, self._variant.model_dump_json(), self._replica, number
            )
            for number, bundle in enumerate(bundles(self._variant))
            if number > 0
        ]
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                texts = await asyncio.gather(*(each.place.remote() for each in self._followers))
        except TimeoutError as error:
            raise EngineFailed(
                f"{self._replica}: its nodes are reserved, but not all actors of the gang were up "
                f"after {JOIN_TIMEOUT_S:.0f} s; `bora doctor` looks at the nodes"
            ) from error
        except ray.exceptions.RayError as error:
            raise EngineFailed(f"{self._replica}: an actor of the gang failed: {error}") from error
        self.places = [RankPlace.model_validate_json(text) for text in texts]
        self._ranks = [
            RankState(node_rank=number, node=place.node, heard_s=time.monotonic())
            for number, place in enumerate(self.places, start=1)
        ]
        self._asking = [
            asyncio.create_task(self._ask_forever(index)) for index in range(len(self._followers))
        ]
        await self._all("prepare")

    async def launch(self) -> Rank:
        """Start all followers' shares; the leader's own rank, which it must start now.

        Raises:
            EngineFailed: one could not.
        """
        host = self._site.host()
        port, rpc_port = free_ports(2, host)
        num_nodes = len(self._followers) + 1
        self._watch = GangWatch(f"{host}:{port}")
        await self._all("launch", num_nodes, host, port, rpc_port)
        return Rank(0, num_nodes, host, port, host, interface_of(host), rpc_port)

    async def facts(self, leader: EngineFacts) -> EngineFacts:
        """Of the whole engine once it has started: data-parallel copies log where they run.

        Raises:
            EngineFailed: a follower is gone.
        """
        if self._variant.shape.data_parallel_size == 1:
            return leader
        return leader.with_copies(await self._all("facts"))

    async def _all(self, method: str, *arguments: object) -> list[Any]:
        calls = [getattr(each, method).remote(*arguments) for each in self._followers]
        answers = []
        for place, call in zip(self.places, calls, strict=True):
            try:
                answers.append(await call)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                raise EngineFailed(f"{self._replica}: {method} on {place.node}: {cause}") from error
        return answers

    async def _ask_forever(self, index: int) -> None:
        """A call to a node that is cut off hangs, so each follower is asked by itself."""
        while True:
            try:
                text = await self._followers[index].state.remote()
            except ray.exceptions.RayError as error:
                self._ranks[index] = replace(self._ranks[index], gone=_first_line(error))
                return
            self.places[index] = place = RankPlace.model_validate_json(text)
            self._ranks[index] = replace(
                self._ranks[index],
                stage=place.stage,
                status=place.status,
                log_tail=place.log_tail,
                heard_s=time.monotonic(),
            )
            await asyncio.sleep(_ASK_PERIOD_S)

    def fault(self, leader: RunningEngine) -> str:
        """Why the gang must start anew; empty: it is sound."""
        if self._watch is None:
            return ""
        now_s = time.monotonic()
        own = RankState(0, self._seat.host, stage=leader.stage, heard_s=now_s)
        return self._watch.fault([own, *self._ranks], now_s)

    async def watch_start(self, leader: RunningEngine) -> None:
        """Until cancelled.

        Raises:
            EngineFailed: the gang will not come up.
        """
        while True:
            if fault := self.fault(leader):
                raise EngineFailed(f"{self._replica}: {fault}")
            await asyncio.sleep(_ASK_PERIOD_S)

    async def end(self) -> None:
        """End the followers' engines, as far as they answer, then the followers."""
        for task in self._asking:
            task.cancel()
        if not self._followers:
            return
        ending = [each.end.remote() for each in self._followers]
        await asyncio.wait([asyncio.ensure_future(each) for each in ending], timeout=_END_TIMEOUT_S)
        for each in self._followers:
            ray.kill(each)

    def end_now(self) -> None:
        """The same from a process that is about to end itself."""
        ending = [each.end.remote() for each in self._followers]
        ray.wait(ending, num_returns=len(ending), timeout=_END_TIMEOUT_S)


def _follower(group: Any, number: int, bundle: dict[str, float]) -> Any:
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
    if "GPU" in bundle:
        options["num_gpus"] = bundle["GPU"]
    else:
        options["resources"] = bundle
    return ray.remote(GangFollower).options(
        **options,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=number
        ),
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def places_of(ranks: Sequence[RankPlace]) -> tuple[RankPlace, ...]:
    """For a heartbeat: without what only the leader needs."""
    return tuple(each.model_copy(update={"log_tail": ""}) for each in ranks)
