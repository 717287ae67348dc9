"""CacheLimits: how much a node's model cache may hold."""

from __future__ import annotations

from dataclasses import dataclass

from placement.model_cache import ModelCacheSpec

GIB = 2**30


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bytes: of all models in the cache (None: nothing is ever evicted), and to leave on the disk."""

    max_bytes: int | None = None
    keep_free_bytes: int = 5 * GIB

    @classmethod
    def of(cls, spec: ModelCacheSpec) -> CacheLimits:
        """As the fleet wants it."""
        most = None if spec.max_gib is None else round(spec.max_gib * GIB)
        return cls(most, round(spec.keep_free_gib * GIB))
