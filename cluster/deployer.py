"""Deployer: makes what Ray Serve runs equal to the plan, as often as it is asked to."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping

from cluster import census, serve_apps
from cluster.gang_nodes import Move, NodeWish, planned_wishes, reserved, shared_out, with_planned
from cluster.generations import Deployed, GenerationKey, key_of
from cluster.head_copy import KeyValues
from cluster.pace import period_s
from cluster.placement_check import NodeFacts
from cluster.site import Site
from placement.plan import Plan, Variant


class Deployer:
    """Compares the plan with what Serve was told, which Serve itself remembers.

    Safe to repeat. A variant whose shape changed gets a generation of its own; the one before it
    serves on until a roll-out ends it (`cluster.rollout`). On which nodes it wants gangs Serve does
    not tell; that is in `kept`, which lives as long as what Serve remembers.
    """

    def __init__(self, site: Site, kept: KeyValues) -> None:
        self._site = site
        self._kept = kept
        self._health_check_s = 1.0
        self._wishes: dict[GenerationKey, tuple[NodeWish, ...]] = {}
        self._lock = asyncio.Lock()

    async def reconcile(
        self, plan: Plan, counts: Mapping[str, int], *, again: bool = True
    ) -> list[str]:
        """Deploy what is new or changed, delete models that are gone; the models that were touched.

        Deleted models drain on their own time. Returns once Serve has taken everything over.
        `again`: try what Serve gave up once more.
        """
        async with self._lock:
            self._health_check_s = period_s(sum(counts.values()))
            deployed = await self.deployed()
            models = {variant.model for variant in plan.variants}
            touched = []
            for key, each in deployed.items():
                if each.model and each.model not in models:
                    await asyncio.to_thread(serve_apps.delete, key, each.parts, wait=False)
                    touched.append(each.model)
            for variant in plan.variants:
                count, told = counts[variant.variant], deployed.get(key_of(variant))
                if told and told.gave_up and not again:
                    continue
                if await self._settle(variant, count, told):
                    touched.append(variant.model)
            return list(dict.fromkeys(touched))

    async def _settle(self, variant: Variant, count: int, told: Deployed | None) -> bool:
        """Whether there was anything to do."""
        key, parts = key_of(variant), told.living if told else {}
        if variant.shape.num_nodes == 1:
            return await self._place(variant, 0, count, parts.get(0))
        nodes = await asyncio.to_thread(census.live_nodes)
        planned = planned_wishes(variant, {node.name: node.node_id for node in nodes.values()})
        wishes = with_planned(await self.wishes(key), planned, parts) if parts else planned
        await self._keep(key, wishes)
        return await self._share_out(variant, count, parts, nodes)

    async def again(self, variant: Variant, count: int) -> None:
        """Have `count` replicas of a generation that Serve gave up; those that run stay."""
        async with self._lock:
            told = (await self.deployed()).get(key_of(variant))
            if told and told.gave_up and not told.deleting:
                await self._settle(variant, count, told)

    async def _share_out(
        self,
        variant: Variant,
        count: int,
        parts: Mapping[int, Deployed],
        nodes: Mapping[str, NodeFacts],
    ) -> bool:
        """Give `count` gangs their places; whether there was anything to do."""
        targets = shared_out(count, await self.wishes(key_of(variant)), parts, nodes)
        changed = [
            await self._place(variant, place, target, parts.get(place))
            for place, target in targets.items()
        ]
        return any(changed)

    async def _place(self, variant: Variant, place: int, count: int, told: Deployed | None) -> bool:
        """Have `count` replicas in a place of a variant; whether there was anything to do."""
        key = key_of(variant)
        if told and told.config == variant.model_dump(mode="json") and not told.gave_up:
            if told.target != count:
                await asyncio.to_thread(serve_apps.scale, key, count, place)
            return told.target != count
        wish = NodeWish()
        if variant.shape.num_nodes > 1:
            wish = (await self.wishes(key))[place]
            if told is None and not wish.nodes:
                wish = await self._without_planned(variant, place)
        health_check_s = self._health_check_s
        if told and told.gave_up:
            # Serve takes that up again only when something of it is new. This restarts nothing, and
            # waits for nothing: a replica that has no place does not hear that it should stop.
            health_check_s += time.time() % 100 / 1000
        await asyncio.to_thread(
            serve_apps.deploy,
            variant,
            count,
            self._site,
            place,
            wish,
            health_check_s=health_check_s,
        )
        return True

    async def _without_planned(self, variant: Variant, place: int) -> NodeWish:
        """Of a place that is made now, for gangs on any nodes that the others leave."""
        key = key_of(variant)
        nodes, wishes = await asyncio.to_thread(census.live_nodes), await self.wishes(key)
        wish = NodeWish(leaves=reserved(variant, wishes, place, nodes))
        await self._keep(key, (*wishes[:place], wish, *wishes[place + 1 :]))
        return wish

    async def wishes(self, key: GenerationKey) -> tuple[NodeWish, ...]:
        """On which nodes each place of a generation wants its gangs.

        Raises:
            ClusterError: Ray does not tell.
        """
        if key not in self._wishes:
            kept = await asyncio.to_thread(self._kept.get, _name(key))
            told = json.loads(kept) if kept else [((), ())]
            self._wishes[key] = tuple(NodeWish(tuple(on), tuple(off)) for on, off in told)
        return self._wishes[key]

    async def _keep(self, key: GenerationKey, wishes: tuple[NodeWish, ...]) -> None:
        await asyncio.to_thread(self._kept.put, _name(key), json.dumps(wishes).encode())
        self._wishes[key] = wishes

    async def move(self, variant: Variant, move: Move) -> None:
        """Give a gang that does not run other nodes than those of its place.

        Raises:
            ClusterError: Ray does not keep that.
        """
        async with self._lock:
            key, place = key_of(variant), move.number
            if move.to is None:
                wishes = await self.wishes(key)
                await self._keep(key, (*wishes[:place], NodeWish(), *wishes[place + 1 :]))
            # Of a deployment that is there Serve takes no other wish for nodes alone.
            await asyncio.to_thread(serve_apps.discard, key, place)
            left = (await self.deployed()).get(key)
            to = place if move.to is None else move.to
            await self._place(variant, to, 1, left.living.get(to) if left else None)

    async def deployed(self) -> dict[GenerationKey, Deployed]:
        """What Serve runs and is not about to forget."""
        deployed = await asyncio.to_thread(serve_apps.deployed)
        return {key: each for key, each in deployed.items() if not each.deleting}

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        """Set the replica count of a generation that is deployed."""
        async with self._lock:
            if len(await self.wishes(key)) == 1:
                await asyncio.to_thread(serve_apps.scale, key, replicas)
                return
            told = (await self.deployed()).get(key)
            if told and told.config:  # else Serve has not taken it over yet
                variant = Variant.model_validate(told.config)
                nodes = await asyncio.to_thread(census.live_nodes)
                await self._share_out(variant, replicas, told.living, nodes)

    async def delete(self, key: GenerationKey) -> None:
        """Let a generation's replicas finish what runs, and forget it. Does not wait for them."""
        async with self._lock:
            told = (await self.deployed()).get(key)
            await asyncio.to_thread(serve_apps.delete, key, told.living if told else (), wait=False)

    async def stop(self) -> None:
        """Delete everything of bora's and wait until its replicas are gone."""
        async with self._lock:
            deployed = await self.deployed()
            parts = [(key, *part) for key, each in deployed.items() for part in each.parts.items()]
            await asyncio.gather(*(asyncio.to_thread(_end, *part) for part in parts))


def _end(key: GenerationKey, place: int, part: Deployed) -> None:
    """Delete a place and wait until its replicas are gone, which those that wait would never be."""
    if any(not replica.node_id for replica in part.replicas):
        serve_apps.discard(key, place)
    serve_apps.delete(key, [place], wait=True)


def _name(key: GenerationKey) -> str:
    return f"pins/{key.variant}:{key.version}"
