"""MIG slices as GPU types: `H100-SXM-MIG-3g.40gb` is half the memory and 3/7 of the arithmetic."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports this module
    from placement.catalogue import GpuType

MARK = "-MIG-"
# What follows a sign are media engines (`+me`, `-me`, `+gfx`).
_PROFILE = re.compile(r"(\d)g\.(\d+)gb(?:[+-].*)?", re.IGNORECASE)
_MEMORY_SLICES = 8  # bandwidth and memory are cut in eighths
_ROUNDING = 0.1  # of an eighth: a profile's name gives whole GB


def slice_name(gpu: str, profile: str) -> str:
    """What the slice is called where a GPU type is asked for; fit for a node label."""
    return f"{gpu}{MARK}{re.split('[+-]', profile)[0].lower()}".rstrip("-")


def mig_slice(gpu: GpuType, profile: str) -> GpuType | None:
    """The share of `gpu` that `profile` (3g.40gb) names; None where it has no such profile.

    Compute in the card's compute slices (mostly sevenths), memory and its bandwidth in eighths; no
    NVLink and no peer access between slices (NVIDIA MIG user guide). Memory is a bound from above:
    a node's own figure goes into the inventory.

    Compute instances (1c.3g.40gb) share the memory of their slice and are none to plan with.
    """
    match = _PROFILE.fullmatch(profile)
    if match is None or gpu.memory_bytes is None or gpu.nvidia_smi_mib is None:
        return None
    exact = _MEMORY_SLICES * int(match[2]) * 1024 / gpu.nvidia_smi_mib
    eighths, compute_slices = round(exact), gpu.mig_compute_slices or 0
    if abs(exact - eighths) > _ROUNDING or not 1 <= eighths <= _MEMORY_SLICES:
        return None  # another card's
    if not 1 <= int(match[1]) <= compute_slices:
        return None
    compute = int(match[1]) / compute_slices
    share = eighths / _MEMORY_SLICES
    changes = {
        "name": slice_name(gpu.name, profile),
        "title": f"{gpu.title}, MIG slice {profile}",
        "aliases": (),
        "memory_bytes": int(gpu.memory_bytes * share),
        "memory_is_guess": True,
        "nvidia_smi_mib": int(gpu.nvidia_smi_mib * share),
        "memory_bandwidth_bytes_per_s": gpu.memory_bandwidth_bytes_per_s * share,
        "bf16_flops": gpu.bf16_flops * compute,
        "fp8_flops": None if gpu.fp8_flops is None else gpu.fp8_flops * compute,
        "fp4_flops": None if gpu.fp4_flops is None else gpu.fp4_flops * compute,
        "nvlink_bytes_per_s": 0.0,
        "pcie_bytes_per_s": gpu.pcie_bytes_per_s * share,
        "peer_to_peer": False,
        "mig_compute_slices": None,
        "price_per_hour": None if gpu.price_per_hour is None else gpu.price_per_hour * compute,
    }
    return gpu.model_copy(update=changes)
