"""What an engine does beside serving its model, as its replica sees it: adapters, balanced experts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.adapter_folder import Elsewhere, locate_on_all
from cluster.adapters import Adapters
from cluster.engine_adapters import EngineAdapters
from cluster.engines.kinds import ENGINES
from cluster.expert_log import ExpertLog
from placement.model_cache import ModelCacheSpec
from placement.plan import Variant

FIRST_ADAPTERS_S = 30.0  # for adapters, before a new replica serves without them


class ServingFeatures:
    """Nothing, until it is started."""

    def __init__(self) -> None:
        self._adapters: Adapters | None = None
        self._experts: ExpertLog | None = None
        self._cache = ModelCacheSpec()
        self._log = Path()
        self._others: Mapping[str, Elsewhere] = {}

    async def start(
        self,
        variant: Variant,
        *,
        url: str,
        api_key: str,
        log: Path,
        others: Mapping[str, Elsewhere],
        changed: Callable[[], Awaitable[None]],
    ) -> asyncio.Task[None]:
        """Follow the variant's adapters from now on, in the task; `changed` hears of each.

        The engine listens at `url`, its output is `log`, and `others` are its other nodes. Adapters are loaded before this returns,
        unless that takes long; later ones are loaded as they come.
        """
        self._experts = ExpertLog(ENGINES[variant.shape.engine], variant, log)
        # Not the engine's log: of what comes here each line is read.
        self._log = log.with_name(f"{log.stem}-adapters.log")
        self._others = others
        self._adapters = Adapters(EngineAdapters(url, api_key), self._locate)
        self.want(variant)
        task = asyncio.create_task(self._adapters.run_forever(changed))
        await self._adapters.settled(FIRST_ADAPTERS_S)
        return task

    def want(self, variant: Variant) -> None:
        """The plan's adapters may be others now."""
        self._cache = variant.model_cache
        if self._adapters is not None:
            self._adapters.want(variant.adapters)

    async def _locate(self, source: str, tell: Callable[[str], None]) -> Path:
        return await locate_on_all(source, self._cache, self._log, self._others, tell)

    def report(self) -> dict[str, Any]:
        """Fields of a `ReplicaReport`."""
        if self._adapters is None or self._experts is None:
            return {}
        return {
            "adapters": dict(self._adapters.loaded),
            "adapter_failures": dict(self._adapters.failures),
            "adapter_stages": dict(self._adapters.stages),
            "expert_balance": self._experts.balance(),
        }
