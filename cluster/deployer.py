"""Deployer: makes what Ray Serve runs equal to the plan, as often as it is asked to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from cluster import serve_apps
from cluster.replica import Site
from placement.plan import Plan, Variant


class Deployer:
    """Compares the plan with what Serve was told, which Serve itself remembers.

    Safe to repeat: Serve restarts a replica only when the version of its shape changes.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._lock = asyncio.Lock()

    async def reconcile(self, plan: Plan, counts: Mapping[str, int]) -> list[str]:
        """Deploy what is new or changed, delete what is gone; the models that were touched.

        Deleted models drain on their own time. Returns once Serve has taken everything over.
        """
        async with self._lock:
            wanted = _by_model(plan.variants)
            deployed = await asyncio.to_thread(serve_apps.deployed)
            touched = []
            for model in deployed.keys() - wanted.keys():
                await asyncio.to_thread(serve_apps.delete, model, wait=False)
                touched.append(model)
            for model, variants in wanted.items():
                told = {name: each.variant for name, each in deployed.get(model, {}).items()}
                if told != {v.variant: v.model_dump(mode="json") for v in variants}:
                    await asyncio.to_thread(serve_apps.deploy, variants, counts, self._site)
                    touched.append(model)
            return touched

    async def targets(self) -> dict[str, int]:
        """Replica counts that Serve aims at, by variant."""
        deployed = await asyncio.to_thread(serve_apps.deployed)
        return {
            name: each.target for variants in deployed.values() for name, each in variants.items()
        }

    async def scale(self, variant: Variant, replicas: int) -> None:
        """Set the replica count of a variant that is deployed."""
        async with self._lock:
            await asyncio.to_thread(serve_apps.scale, variant, replicas)

    async def stop(self) -> None:
        """Delete everything of bora's and wait until its replicas are gone."""
        async with self._lock:
            models = await asyncio.to_thread(serve_apps.deployed)
            deletions = (asyncio.to_thread(serve_apps.delete, model, wait=True) for model in models)
            await asyncio.gather(*deletions)


def _by_model(variants: tuple[Variant, ...]) -> dict[str, tuple[Variant, ...]]:
    models = dict.fromkeys(variant.model for variant in variants)
    return {model: tuple(v for v in variants if v.model == model) for model in models}
