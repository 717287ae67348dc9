"""Weights to a node of the Ray cluster, by an actor that lives there meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import weights
from cluster.errors import WeightsMissing
from cluster.names import log_folder
from placement.plan import Variant

_POLL_S = 1.0


class Fetcher:
    """On the node that the weights are for."""

    def __init__(self) -> None:
        self._stage = ""

    async def fetch(self, variant: str, log: str) -> None:
        """Bring the weights of `variant` (JSON)."""
        await weights.bring(Variant.model_validate_json(variant), Path(log), self._note)

    async def stage(self) -> str:
        """How far it is."""
        return self._stage

    def _note(self, stage: str) -> None:
        self._stage = stage


class RayFetch:
    """`cluster.prefetch.NodeFetch` for the cluster that this process has joined.

    Logs go below `log_dir` on the node, to the model's `prefetch.log`.
    """

    def __init__(self, log_dir: str) -> None:
        self._log_dir = Path(log_dir)

    async def __call__(self, variant: Variant, node_id: str, tell: Callable[[str], None]) -> None:
        """Return when the weights are there.

        Raises:
            WeightsMissing: they cannot be had, or the node is gone.
        """
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": pinned}
        fetcher = ray.remote(Fetcher).options(**options).remote()
        log = self._log_dir / log_folder(variant.model) / "prefetch.log"
        reference = fetcher.fetch.remote(variant.model_dump_json(), str(log))
        fetching = asyncio.ensure_future(asyncio.wrap_future(reference.future()))
        try:
            while not (await asyncio.wait({fetching}, timeout=_POLL_S))[0]:
                tell(await fetcher.stage.remote())
            await fetching
        except ray.exceptions.RayTaskError as error:
            raise WeightsMissing(str(error.cause)) from error
        except ray.exceptions.RayError as error:
            raise WeightsMissing(f"the node is gone: {error}") from error
        finally:
            fetching.cancel()
            ray.kill(fetcher)
