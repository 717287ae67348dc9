"""Deployer: makes what Ray Serve runs equal to the plan, as often as it is asked to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from cluster import serve_apps
from cluster.gang import Site
from cluster.generations import Deployed, GenerationKey, key_of
from placement.plan import Plan, Variant


class Deployer:
    """Compares the plan with what Serve was told, which Serve itself remembers.

    Safe to repeat. A variant whose shape changed gets a generation of its own; the one before it
    serves on until a roll-out ends it (`cluster.rollout`).
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._lock = asyncio.Lock()

    async def reconcile(self, plan: Plan, counts: Mapping[str, int]) -> list[str]:
        """Deploy what is new or changed, delete models that are gone; the models that were touched.

        Deleted models drain on their own time. Returns once Serve has taken everything over.
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
                count = counts[variant.variant]
                if await self._settle(variant, count, deployed.get(key_of(variant))):
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
        await asyncio.to_thread(serve_apps.deploy, variant, count, self._site)
        return True

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
