"""Gang: an engine with ranks on several nodes, an actor on each; the replica leads, others follow.

What a follower does stands in `cluster.gang_follower`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.adapter_folder import Elsewhere
from cluster.claimed_ports import ClaimedPorts, claim_ports
from cluster.engines.adapter import EngineFacts, Rank
from cluster.errors import AdapterFailed, EngineFailed
from cluster.gang_follower import GangFollower
from cluster.gang_nodes import rank_order
from cluster.gang_state import GangWatch, RankState
from cluster.generations import bundles
from cluster.messages import RankPlace
from cluster.ray_inventory import node_name
from cluster.running_engine import RunningEngine
from cluster.seat import Seat, interface_of
from cluster.site import Site
from placement.model_cache import ModelCacheSpec
from placement.plan import Variant

JOIN_TIMEOUT_S = 60.0  # for a follower's actor to come up: its place has been reserved before
_ASK_PERIOD_S = 0.5
_END_TIMEOUT_S = 3.0


class Gang:
    """The followers of a replica, seen from the leader; all are in the replica's placement group."""

    def __init__(self, site: Site, variant: Variant, replica: str, seat: Seat) -> None:
        self._site = site
        self._variant = variant
        self._replica = replica
        self._seat = seat
        self._followers: list[Any] = []
        self._watch = GangWatch()
        self._claimed: ClaimedPorts | None = None  # as long as this process lives
        self._ranks: list[RankState] = []
        self._asking: list[asyncio.Task[None]] = []
        self.places: list[RankPlace] = []

    async def assemble(self) -> None:
        """Have an actor on each of the other nodes.

        Raises:
            EngineFailed: one does not come up.
        """
        group = ray.util.get_current_placement_group()
        nodes = await asyncio.to_thread(_nodes_of, group)
        shares, order = bundles(self._variant), rank_order(self._variant, nodes)
        self._ranks = [
            RankState(rank, nodes[number]) for rank, number in enumerate(order) if rank > 0
        ]
        self._followers = [
            _follower(group, number, shares[number]).remote(
                self._site, self._variant.model_dump_json(), self._replica, rank
            )
            for rank, number in enumerate(order)
            if rank > 0
        ]
        calls = [asyncio.ensure_future(each.place.remote()) for each in self._followers]
        await asyncio.wait(calls, timeout=JOIN_TIMEOUT_S, return_when=asyncio.FIRST_EXCEPTION)
        missing = []
        for rank, call in zip(self._ranks, calls, strict=True):
            if not call.done():
                missing.append(rank.name)
            elif error := call.exception():
                raise EngineFailed(f"{self._replica}: {rank.name}: its actor failed: {error}")
        if missing:
            raise EngineFailed(
                f"{self._replica}: its nodes are reserved, but {' and '.join(missing)} had no "
                f"actor after {JOIN_TIMEOUT_S:.0f} s; `bora doctor` looks at these nodes, and "
                f"Ray's own logs there (raylet.out) tell why no worker starts"
            )
        self.places = [RankPlace.model_validate_json(call.result()) for call in calls]
        self._ranks = [
            replace(rank, node=place.node, log_file=place.log_file, heard_s=time.monotonic())
            for rank, place in zip(self._ranks, self.places, strict=True)
        ]
        self._asking = [
            asyncio.create_task(self._ask_forever(index)) for index in range(len(self._followers))
        ]

    async def prepare(self) -> None:
        """Have the GPUs and the weights at hand on each of the other nodes.

        Raises:
            EngineFailed: one cannot have them.
        """
        await self._all("prepare")

    async def launch(self) -> Rank:
        """Start all followers' shares; the leader's own rank, which it must start now.

        Raises:
            EngineFailed: one could not.
        """
        host = self._site.host()
        self._claimed = claim_ports(2, host)
        port, rpc_port = self._claimed.ports
        num_nodes = len(self._followers) + 1
        self._watch.master = f"{host}:{port}"
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

    def elsewhere(self) -> dict[str, Elsewhere]:
        """How each of the other nodes brings an adapter, by its rank's name."""
        ranks = zip(self._ranks, self._followers, strict=True)
        return {rank.name: partial(_locate_adapter, follower) for rank, follower in ranks}

    async def _all(self, method: str, *arguments: object) -> list[Any]:
        """Answers by rank. The first that fails counts: others may take an hour for weights."""

        async def ask(follower: Any, rank: RankState) -> Any:
            try:
                return await getattr(follower, method).remote(*arguments)
            except ray.exceptions.RayError as error:
                raise EngineFailed(
                    f"{self._replica}: {method} of {rank.name}: {_cause(error)}{rank.where}"
                ) from error

        return await asyncio.gather(*map(ask, self._followers, self._ranks))

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
        """Why the gang must start anew; empty: it is sound.

        `leader`: the engine of this node.
        """
        now_s = time.monotonic()
        own = RankState(
            0, self._seat.host, stage=leader.stage, heard_s=now_s, log_file=str(leader.log)
        )
        return self._watch.fault([own, *self._ranks], now_s)

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


def _nodes_of(group: Any) -> list[str]:
    """The nodes of its bundles, as plans name them."""
    names = {node["NodeID"]: node_name(node) for node in ray.nodes()}
    places = placement_group_table(group)["bundles_to_node_id"]
    return [names[places[number]] for number in sorted(places)]


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


async def _locate_adapter(follower: Any, source: str, cache: ModelCacheSpec) -> str:
    try:
        return str(await follower.locate_adapter.remote(source, cache))
    except ray.exceptions.RayError as error:
        raise AdapterFailed(str(_cause(error))) from error


def _cause(error: Exception) -> object:
    """Of what an actor's method raised, without Ray's traceback."""
    return getattr(error, "cause", None) or error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def places_of(ranks: Sequence[RankPlace]) -> tuple[RankPlace, ...]:
    """For a heartbeat: without what only the leader needs."""
    return tuple(each.model_copy(update={"log_tail": ""}) for each in ranks)
