"""PlanKeeper: the plan that is carried out, in memory, on disk, and in Redis where that is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from cluster.files import replace_text
from cluster.gcs_values import copy_of_head
from cluster.generations import Deployed, GenerationKey, plan_of
from cluster.head_copy import PLAN_FILE, HeadCopy
from placement.errors import UnknownName
from placement.plan import Plan, Variant
from placement.spec import dump_yaml, parse_yaml


class PlanKeeper:
    """`current` is None until there is one. The file lies in `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / PLAN_FILE
        self.current: Plan | None = None
        self.copy: HeadCopy | None = None  # only where Ray's state outlives this host

    def variants(self) -> tuple[Variant, ...]:
        """The plan's."""
        return self.current.variants if self.current else ()

    def of(self, model: str) -> list[Variant]:
        """A model's.

        Raises:
            UnknownName: the plan has no such model.
        """
        found = [variant for variant in self.variants() if variant.model == model]
        if not found:
            raise UnknownName("model", model, {variant.model for variant in self.variants()})
        return found

    async def restore(self) -> list[str]:
        """Bring to disk what a disk that was lost, or an old one, lacks; what was done, in words.

        Raises:
            ClusterError: there is a copy of this head, and it cannot be read.
        """
        self.copy = copy_of_head(self._run_dir)
        return await asyncio.to_thread(self.copy.restore) if self.copy else []

    async def kept(self, served: Mapping[GenerationKey, Deployed]) -> Plan | None:
        """From disk; without one, what Serve knows, for it was told of the plan."""
        return await asyncio.to_thread(self._read) or plan_of(served)

    def _read(self) -> Plan | None:
        if not self._path.exists():
            return None
        return parse_yaml(self._path.read_text(encoding="utf-8"), Plan, source=str(self._path))

    async def keep(self, plan: Plan) -> None:
        """Write it down, for the controller after this one. It is not `current` by that."""
        await asyncio.to_thread(replace_text, self._path, dump_yaml(plan))
        if self.copy:
            self.copy.nudge()

    async def forget(self) -> None:
        """There is none any more.

        Raises:
            ClusterError: its copy is still there.
        """
        self.current = None
        self._path.unlink(missing_ok=True)
        if self.copy:
            await asyncio.to_thread(self.copy.forget)
