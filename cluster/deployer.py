"""Deployer: makes what Ray Serve runs equal to the plan, as often as it is asked to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import ray

from cluster import serve_apps
from cluster.gang import Site
from cluster.gang_nodes import planned_pins
from cluster.generations import Deployed, GenerationKey, key_of
from cluster.head_copy import KeyValues
from cluster.ray_inventory import node_name
from placement.plan import Plan, Variant


class Deployer:
    """Compares the plan with what Serve was told, which Serve itself remembers.

    Safe to repeat. A variant whose shape changed gets a generation of its own; the one before it
    serves on until a roll-out ends it (`cluster.rollout`). On which nodes it pinned a gang Serve does
    not tell; that is in `kept`, which lives as long as what Serve remembers.
    """

    def __init__(self, site: Site, kept: KeyValues) -> None:
        self._site = site
        self._kept = kept
        self._pins: dict[GenerationKey, tuple[str, ...]] = {}
        self._lock = asyncio.Lock()

    async def reconcile(
        self, plan: Plan, counts: Mapping[str, int], *, again: bool = True
    ) -> list[str]:
        """Deploy what is new or changed, delete models that are gone; the models that were touched.

        Deleted models drain on their own time. Returns once Serve has taken everything over.
        `again`: try what Serve gave up once more.
        """
        async with self._lock:
            deployed = await self.deployed()
            models = {variant.model for variant in plan.variants}
            touched = []
            for key, each in deployed.items():
                if each.model and each.model not in models:
                    await asyncio.to_thread(serve_apps.delete, key, wait=False)
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
        if told and not told.gave_up and told.config == variant.model_dump(mode="json"):
            if told.target != count:
                await asyncio.to_thread(serve_apps.scale, key_of(variant), count)
            return told.target != count
        if told and told.gave_up:  # asked for once more: Serve itself would not try again
            await asyncio.to_thread(serve_apps.delete, key_of(variant), wait=True)
        if told is None or told.gave_up:
            await self._pin(variant, planned_pins(variant, await asyncio.to_thread(_live_nodes)))
        pins = await self.pins(variant)
        await asyncio.to_thread(serve_apps.deploy, variant, count, self._site, pins)
        return True

    async def pins(self, variant: Variant) -> tuple[str, ...]:
        """Ray's ids of the nodes that a gang must be on, by rank; empty: any of its pools will do.

        Raises:
            ClusterError: Ray does not tell.
        """
        if variant.shape.num_nodes == 1:
            return ()
        key = key_of(variant)
        if key not in self._pins:
            kept = await asyncio.to_thread(self._kept.get, _name(key))
            self._pins[key] = tuple(json.loads(kept or b"[]"))
        return self._pins[key]

    async def unpin(self, variant: Variant, replicas: int) -> None:
        """From now on any node of its pools will do; it is deployed anew, for none of it runs.

        Raises:
            ClusterError: Ray does not keep that.
        """
        async with self._lock:
            await self._pin(variant, ())
            # Of a deployment that is there Serve takes no other wish for nodes alone.
            await asyncio.to_thread(serve_apps.discard, key_of(variant))
            await asyncio.to_thread(serve_apps.deploy, variant, replicas, self._site)

    async def _pin(self, variant: Variant, pins: tuple[str, ...]) -> None:
        if variant.shape.num_nodes > 1:
            key = key_of(variant)
            await asyncio.to_thread(self._kept.put, _name(key), json.dumps(pins).encode())
            self._pins[key] = pins

    async def deployed(self) -> dict[GenerationKey, Deployed]:
        """What Serve runs and is not about to forget."""
        deployed = await asyncio.to_thread(serve_apps.deployed)
        return {key: each for key, each in deployed.items() if not each.deleting}

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        """Set the replica count of a generation that is deployed."""
        async with self._lock:
            await asyncio.to_thread(serve_apps.scale, key, replicas)

    async def delete(self, key: GenerationKey) -> None:
        """Let a generation's replicas finish what runs, and forget it. Does not wait for them."""
        async with self._lock:
            await asyncio.to_thread(serve_apps.delete, key, wait=False)

    async def stop(self) -> None:
        """Delete everything of bora's and wait until its replicas are gone."""
        async with self._lock:
            keys = await self.deployed()
            deletions = (asyncio.to_thread(serve_apps.delete, key, wait=True) for key in keys)
            await asyncio.gather(*deletions)


def _name(key: GenerationKey) -> str:
    return f"pins/{key.variant}:{key.version}"


def _live_nodes() -> dict[str, str]:
    """Ray's ids by the names that plans use."""
    return {node_name(node): node["NodeID"] for node in ray.nodes() if node["Alive"]}
