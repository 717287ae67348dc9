"""Nodes as honest probes would find them: each field open to a lie."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from placement.node_facts import DiskFacts, GpuFacts, NicFacts, NodeFacts, PairFacts

MIB = 2**20
GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"
A100_40 = "NVIDIA A100-SXM4-40GB"
A100_80 = "NVIDIA A100-SXM4-80GB"
RTX_4090 = "NVIDIA GeForce RTX 4090"


def a_gpu(index: int = 0, **changes: Any) -> GpuFacts:
    fields: dict[str, Any] = {
        "index": index,
        "name": H100,
        "uuid": f"GPU-{index}",
        "memory_bytes": 81559 * MIB,
        "torch_memory_bytes": 85_018_877_624,
        "pcie_max_generation": 5,
        "pcie_width": 16,
        "pcie_max_width": 16,
        "ecc": True,
    }
    return GpuFacts(**{**fields, **changes})


def a_4090(index: int = 0, **changes: Any) -> GpuFacts:
    fields: dict[str, Any] = {
        "name": RTX_4090,
        "memory_bytes": 24564 * MIB,
        "torch_memory_bytes": 25_250_627_584,
        "pcie_max_generation": 4,
        "ecc": False,
    }
    return a_gpu(index, **{**fields, **changes})


def an_a100(index: int = 0, *, gib: int = 80, **changes: Any) -> GpuFacts:
    fields: dict[str, Any] = {
        "name": A100_40 if gib == 40 else A100_80,
        "memory_bytes": gib * GIB,
        "torch_memory_bytes": 42_305_427_866 if gib == 40 else 85_094_039_552,
        "pcie_max_generation": 4,
    }
    return a_gpu(index, **{**fields, **changes})


def pairs(count: int, **changes: Any) -> tuple[PairFacts, ...]:
    fields: dict[str, Any] = {
        "path": "NV18",
        "peer": "OK",
        "copy_correct": True,
        "copy_bytes_per_s": 3.9e11,
    }
    return tuple(
        PairFacts(first=first, second=second, **{**fields, **changes})
        for first, second in combinations(range(count), 2)
    )


def a_node(name: str = "h1", **changes: Any) -> NodeFacts:
    """An H100 host with eight GPUs."""
    fields: dict[str, Any] = {
        "node": f"{name}-0000abcd",
        "host": name,
        "pool": "h100",
        "labels": {"zone": "a"},
        "driver": "580.95.05",
        "gpus": tuple(a_gpu(index) for index in range(8)),
        "pairs": pairs(8),
        "host_memory_bytes": 2015 * GIB,
        "disk": DiskFacts(path="/cache", total_bytes=4000 * GIB, free_bytes=3000 * GIB),
        "nics": (NicFacts(name="mlx5_0/1", gbps=400.0),),
        "versions": {
            "bora": "0.1.0", "ray": "2.60.0", "python": "3.11.7",
            "vllm": "0.32.0", "torch": "2.13.0", "cuda": "13.0",
        },
        "clock_offset_s": 0.01,
        "clock_error_s": 0.02,
    }  # fmt: skip
    return NodeFacts(**{**fields, **changes})
