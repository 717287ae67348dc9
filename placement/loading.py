"""How long a replica takes to start: its weights, read from disk, and the engine's own start."""

from __future__ import annotations

from placement.memory import memory_use
from placement.option import Option
from placement.plan import Shape, Variant

# Guesses: an NVMe disk that feeds all GPUs of a node; profiling, compiling and CUDA graphs.
DISK_BYTES_PER_S = 2e9
ENGINE_START_S = 60.0


def load_bytes(variant: Variant) -> int:
    """Bytes of weights that one replica reads."""
    on_cpu = variant.gpu == "cpu"
    return _on_gpus_and_host(variant.shape, variant.shape.num_gpus, on_cpu=on_cpu)


def variant_load_s(variant: Variant) -> float:
    """Seconds from the decision to start a replica until it serves."""
    return ENGINE_START_S + load_bytes(variant) / DISK_BYTES_PER_S


def load_s(option: Option) -> float:
    """As `variant_load_s`, for an option."""
    ranks = option.candidate.num_ranks
    if option.shape is None:
        held = memory_use(option.candidate).per_gpu.weights_bytes * ranks
    else:
        held = _on_gpus_and_host(option.shape, ranks, on_cpu=option.candidate.device.is_cpu)
    return ENGINE_START_S + held / DISK_BYTES_PER_S


def _on_gpus_and_host(shape: Shape, ranks: int, *, on_cpu: bool) -> int:
    """The host's part is llama.cpp's, with buffers that are little beside weights left there."""
    host = 0 if on_cpu else shape.host_memory_bytes
    return shape.per_gpu.weights_bytes * ranks + host
