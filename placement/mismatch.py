"""Mismatch: one thing that an inventory says and a host does not bear out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from placement.candidate import device_of
from placement.catalogue import Catalogue, GpuType
from placement.inventory import Pool
from placement.spec import Spec

GIB = 2**30


class Mismatch(Spec):
    """`error`: what was planned would fail, or be far from its promise; else `warning`."""

    rule: str
    host: str
    pool: str = ""
    declared: str
    found: str
    cure: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return (
            f"{self.host}: {self.rule}: declared {self.declared}; found {self.found}. "
            f"Cure: {self.cure}"
        )


@dataclass(frozen=True, slots=True)
class Expected:
    """What a pool promises of each of its nodes."""

    pool: Pool
    gpu: GpuType
    link: str  # nvlink, pcie, pcie-no-p2p or host
    memory_bytes: int  # torch-visible, per GPU or slot
    checkpoints: Mapping[str, int]

    @staticmethod
    def of(pool: Pool, catalogue: Catalogue, checkpoints: Mapping[str, int]) -> Expected:
        """What the planner takes this pool for.

        Raises:
            UnknownName: its GPU type is not in the catalogue.
        """
        gpu = catalogue.gpu(pool.gpu)
        device = device_of(pool, gpu)
        return Expected(pool, gpu, device.link, device.memory_bytes or 0, checkpoints)

    @property
    def is_cpu(self) -> bool:
        """Whether its devices are slots of a machine without GPUs."""
        return self.gpu.compute_capability is None

    def mismatch(
        self,
        rule: str,
        host: str,
        *,
        declared: str,
        found: str,
        cure: str,
        severity: Literal["error", "warning"] = "error",
    ) -> Mismatch:
        """One of this pool's."""
        return Mismatch(
            rule=rule,
            host=host,
            pool=self.pool.name,
            declared=declared,
            found=found,
            cure=cure,
            severity=severity,
        )
