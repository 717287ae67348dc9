"""What a replica needs of its engine, and which one it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cluster.devices import HeldDevices
from cluster.engine_process import EngineProcess
from cluster.engines.adapter import EngineFacts, EngineLoad, Rank
from cluster.engines.kinds import ENGINES
from cluster.engines.sim import runs_inside
from placement.plan import Variant


class RunningEngine(Protocol):
    """An engine from its start to its end; see `cluster.engine_process.EngineProcess`."""

    log: Path
    api_key: str
    url: str
    stage: str
    facts: EngineFacts
    load: EngineLoad

    @property
    def pid(self) -> int:
        """The process to look at."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the engine was started and has ended."""
        ...

    async def start(
        self, checkpoint: Path | str, devices: HeldDevices | None = None, rank: Rank | None = None
    ) -> None:
        """Start it on these devices, as this rank of a gang, and wait until it answers."""
        ...

    def note_stage(self, stage: str) -> None:
        """What goes on before it starts."""
        ...

    async def observe(self) -> bool:
        """Refresh `load`; False when it is not healthy."""
        ...

    async def drained(self, timeout_s: float) -> None:
        """Wait until nothing runs."""
        ...

    def stop(self) -> None:
        """End it; blocks, so call it from a thread."""
        ...

    def kill(self) -> None:
        """End one that answers nothing."""
        ...

    def log_tail(self) -> str:
        """The last lines of its output."""
        ...


def engine_for(variant: Variant, *, host: str, log: Path) -> RunningEngine:
    """A process for the engine; for a simulated one inside of this process, none."""
    if runs_inside(variant) and variant.shape.num_nodes == 1:
        # Only here: a replica with a real engine need not load the simulation.
        from cluster.engines.sim_inside import SimInside  # noqa: PLC0415

        return SimInside(variant, host=host, log=log)
    return EngineProcess(ENGINES[variant.shape.engine], variant, host=host, log=log)
