"""GangFollower: the actor that has a node's share of an engine that spans several.

It holds its node's GPUs and its share of the engine. It ends when its engine does, when the leader's
actor does (Ray ends what a dead actor owns), and when the leader has not asked after it for
`LEASE_S`: cut off from the cluster it must not hold GPUs that a successor is given.
"""

from __future__ import annotations

import asyncio
import os
import time

from cluster import weights
from cluster.adapter_folder import locate_adapter
from cluster.engine_process import EngineProcess
from cluster.engines.adapter import EngineFacts, Rank
from cluster.engines.kinds import ENGINES
from cluster.messages import RankPlace
from cluster.seat import interface_of, my_seat, with_gpus
from cluster.site import Site
from placement.model_cache import ModelCacheSpec
from placement.plan import Variant

LEASE_S = 30.0


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
        self._seat = await asyncio.to_thread(
            with_gpus, self._seat, self._variant, self._name, self._rank
        )
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

    async def locate_adapter(self, source: str, cache: ModelCacheSpec) -> str:
        """The adapter's folder on this node, where the ranks of this node read it."""
        log = self._site.log(self._variant, f"{self._name}-adapters")
        return str(await locate_adapter(source, cache, log))

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
