"""What a pool promises by its GPU type, against what a short run on the node's devices showed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from placement.loading import DISK_BYTES_PER_S
from placement.mismatch import GIB, Expected, Mismatch
from placement.node_facts import GpuFacts, NodeFacts

# vLLM takes 92 % of a GPU and does not start where less is free.
_TAKEN = 0.05
# Of what data sheets say. A short copy reaches 60 to 90 % of it, one with a fault far less.
_FAR_LESS = 0.3


def of_node(expected: Expected, node: NodeFacts, gpus: Sequence[GpuFacts]) -> list[Mismatch]:
    """Of its `gpus`, and of the disk that feeds them."""
    if expected.is_cpu or node.measured is None:  # unmeasured: engines may have run there
        return []
    return [
        *_taken(expected, node, gpus),
        *_host_copies(expected, node, gpus),
        *_memory(expected, node),
        *_disk(expected, node),
    ]


def _taken(expected: Expected, node: NodeFacts, gpus: Sequence[GpuFacts]) -> Iterator[Mismatch]:
    for gpu in gpus:
        if gpu.used_bytes > _TAKEN * gpu.memory_bytes:
            yield expected.mismatch(
                "gpu-memory-taken",
                node.host,
                declared=f"the whole memory of each {expected.gpu.name}",
                found=f"GPU {gpu.index}: {gpu.used_bytes / GIB:.1f} GiB in use before any engine",
                cure="see whose processes they are (`nvidia-smi`, `fuser -v /dev/nvidia*`) and end "
                "them; a graphical session can move to another card",
            )


def _host_copies(
    expected: Expected, node: NodeFacts, gpus: Sequence[GpuFacts]
) -> Iterator[Mismatch]:
    declared = expected.gpu.pcie_bytes_per_s
    for gpu in gpus:
        measured = gpu.host_to_device_bytes_per_s
        if measured is not None and measured < _FAR_LESS * declared:
            yield expected.mismatch(
                "host-copies-slow",
                node.host,
                declared=f"{declared / 1e9:.0f} GB/s from host memory",
                found=f"GPU {gpu.index}: {measured / 1e9:.1f} GB/s",
                cure="look for a link that retrains (`nvidia-smi -q -d PCIE`, `dmesg` for AER), a "
                "riser, an IOMMU that translates (`iommu=pt`), memory channels that are empty",
                severity="warning",
            )


def _memory(expected: Expected, node: NodeFacts) -> Iterator[Mismatch]:
    measured = node.measured.copy_bytes_per_s if node.measured else None
    declared = expected.gpu.memory_bandwidth_bytes_per_s
    if measured is not None and measured < _FAR_LESS * declared:
        yield expected.mismatch(
            "gpu-memory-slow",
            node.host,
            declared=f"{declared / 1e9:.0f} GB/s in a GPU's own memory",
            found=f"{measured / 1e9:.0f} GB/s on the slowest GPU",
            cure="look for a cap on power or clocks, or heat (`nvidia-smi -q -d PERFORMANCE,CLOCK`)",
            severity="warning",
        )


def _disk(expected: Expected, node: NodeFacts) -> Iterator[Mismatch]:
    measured = node.disk.read_bytes_per_s if node.disk else None
    if node.disk is not None and measured is not None and measured < _FAR_LESS * DISK_BYTES_PER_S:
        yield expected.mismatch(
            "disk-slow",
            node.host,
            declared=f"weights read at {DISK_BYTES_PER_S / 1e9:g} GB/s, as start times are planned",
            found=f"{measured / 1e6:.0f} MB/s in {node.disk.path}",
            cure="put the cache (HF_HOME) on an NVMe disk; until then replicas start "
            f"{DISK_BYTES_PER_S / measured:.0f} times later than planned",
            severity="warning",
        )
