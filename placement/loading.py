"""How long a replica takes to start: its weights, read from disk, and the engine's own start."""

from __future__ import annotations

from placement.memory import memory_use
from placement.options import Option
from placement.plan import Variant

# Guesses: an NVMe disk that feeds all GPUs of a node; profiling, compiling and CUDA graphs.
DISK_BYTES_PER_S = 2e9
ENGINE_START_S = 60.0


def load_bytes(variant: Variant) -> int:
    """Bytes of weights that one replica reads."""
    return variant.shape.per_gpu.weights_bytes * variant.shape.num_gpus


def variant_load_s(variant: Variant) -> float:
    """Seconds from the decision to start a replica until it serves."""
    return ENGINE_START_S + load_bytes(variant) / DISK_BYTES_PER_S


def load_s(option: Option) -> float:
    """As `variant_load_s`, for an option."""
    gpu = option.shape.per_gpu if option.shape else memory_use(option.candidate).per_gpu
    return ENGINE_START_S + gpu.weights_bytes * option.candidate.num_ranks / DISK_BYTES_PER_S
