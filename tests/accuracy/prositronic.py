"""The seeds' calculator (prositronic.eu), reproduced: a compatibility oracle, not an estimate.

Its "GB" are GiB, a card has its nominal memory, and all of a file lies in its layers.
"""

from __future__ import annotations

from dataclasses import dataclass

_RESERVE_GIB = 1.845
_OVERHEAD_GIB = 1.27
_KV_SHARE = 1.25


@dataclass(frozen=True, slots=True)
class Page:
    """What a page prints: to one decimal."""

    gpu_layers: int
    used_gb: float
    host_gb: float


def page(*, size_gb: float, num_layers: int, gpu_gb: float, kv_cache_gb: float) -> Page:
    """Layers = floor((memory - 1.845) / (size / layers)); 1.25 x KV and 1.27 on top."""
    layer = size_gb / num_layers
    gpu_layers = min(num_layers, int((gpu_gb - _RESERVE_GIB) / layer))
    used = gpu_layers * layer + _KV_SHARE * kv_cache_gb + _OVERHEAD_GIB
    host = size_gb * (1 - gpu_layers / num_layers)
    return Page(gpu_layers, round(used, 1), round(host, 1))
