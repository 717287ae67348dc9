"""From a driver's product name to a GPU type of the catalogue."""

from __future__ import annotations

from placement.catalogue import Catalogue, GpuType
from placement.errors import UnknownName

# Of cards that share a name; nvidia-smi's totals of different memory sizes lie further apart.
_MEMORY_TOLERANCE = 0.15


def gpu_type_of(name: str, memory_bytes: int, catalogue: Catalogue) -> GpuType | None:
    """The type whose product name this is; None: the catalogue does not have it.

    A card with a known name and another memory size (a 4090 with 48 GB) is another type.
    """
    short = name.removeprefix("NVIDIA ").removeprefix("GeForce ").replace(" ", "-")
    try:
        gpu = catalogue.gpu(short)
    except UnknownName:
        return None
    expected = (gpu.nvidia_smi_mib or 0) * 2**20
    if expected and abs(memory_bytes / expected - 1) > _MEMORY_TOLERANCE:
        return None
    return gpu
