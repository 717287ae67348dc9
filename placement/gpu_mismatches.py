"""What a pool says of its GPUs, against the GPUs of a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from placement import link_mismatches, speed_mismatches
from placement.catalogue import Catalogue
from placement.gpu_names import gpu_type_of
from placement.mig import MARK, slice_name
from placement.mismatch import GIB, Expected, Mismatch
from placement.node_facts import GpuFacts, NodeFacts

# Bytes/s of one PCIe lane by generation, one direction.
_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
_HALF = 0.6  # of the declared bandwidth: below it a plan's transfer times are wrong
_QUARTER = 0.3
_MEMORY_TOLERANCE = 0.02  # between drivers, torch-visible memory differs by less
_DRIVER_TOLERANCE = 0.05  # nvidia-smi's figure is up to 4 % above torch's


def of_node(expected: Expected, node: NodeFacts, catalogue: Catalogue) -> list[Mismatch]:
    """Everything about GPUs, their memory, their slots and the links between them."""
    if expected.is_cpu:
        return []
    if MARK in expected.gpu.name:
        return list(_slices(expected, node, catalogue))
    own = own_gpus(expected.gpu.name, node.gpus, catalogue, expected.pool.gpus_per_node)
    answer = [*_count_and_type(expected, node, own, catalogue), *_mig(expected, node, own)]
    other_card = any(lie.rule in ("gpu-type", "gpu-memory") for lie in answer)
    for gpu in own:
        if not other_card:  # its memory and slot differ for that reason
            answer += [*_memory(expected, node, gpu), *_pcie(expected, node, gpu)]
            answer += _capability(expected, node, gpu)
        answer += _ecc(expected, node, gpu)
    indices = {gpu.index for gpu in own}
    inside = [pair for pair in node.pairs if {pair.first, pair.second} <= indices]
    return [
        *answer,
        *link_mismatches.of_pairs(expected, node, inside),
        *speed_mismatches.of_node(expected, node, () if other_card else own),
    ]


def own_gpus(
    declared: str, gpus: Sequence[GpuFacts], catalogue: Catalogue, count: int
) -> tuple[GpuFacts, ...]:
    """In a mixed box those of the declared type; where none is, all.

    Cards that MIG cuts are another pool's where `count` others are there.
    """
    types = [gpu_type_of(gpu.name, gpu.memory_bytes, catalogue) for gpu in gpus]
    own = tuple(
        gpu for gpu, kind in zip(gpus, types, strict=True) if kind and kind.name == declared
    )
    own = own or tuple(gpus)
    whole = tuple(gpu for gpu in own if not gpu.mig)
    return whole if len(whole) >= count else own


def _count_and_type(
    expected: Expected, node: NodeFacts, own: Sequence[GpuFacts], catalogue: Catalogue
) -> Iterator[Mismatch]:
    wanted = expected.pool.gpus_per_node
    if not own:
        yield _no_gpu(expected, node)
        return
    if node.measured and node.measured.device == "cpu" and not node.measured.problem:
        yield expected.mismatch(
            "gpu-unusable",
            node.host,
            declared=f"{wanted} x {expected.gpu.name}",
            found=f"driver {node.driver} lists GPUs, torch {node.versions.get('torch', '?')} "
            "can use none of them",
            cure="install requirements/gpu.txt there (a CPU build of torch sees no GPU), and a "
            "driver that its CUDA works with",
        )
    if len(own) != wanted:
        present = ", ".join(str(gpu.index) for gpu in own)
        lost = "".join(f"; {problem}" for problem in node.problems) if len(own) < wanted else ""
        fallen = "look in `dmesg` for Xid errors (a GPU that fell off the bus), reseat or reset it"
        advice = fallen if len(own) < wanted else "give the rest to another pool"
        yield expected.mismatch(
            "gpu-count",
            node.host,
            declared=f"{wanted} GPUs",
            found=f"{len(own)} (index {present}){lost}",
            cure=f"{advice}; or set gpus_per_node: {len(own)}",
            severity="error" if len(own) < wanted else "warning",
        )
    for (name, memory), count in Counter((gpu.name, gpu.memory_bytes) for gpu in own).items():
        kind = gpu_type_of(name, memory, catalogue)
        if kind is not None and kind.name == expected.gpu.name:
            continue
        cure = f"set gpu: {kind.name}" if kind else "describe the card in configs/gpus/"
        twin = kind is not None and kind.ray_accelerator_type == expected.gpu.ray_accelerator_type
        less = memory < (expected.gpu.nvidia_smi_mib or 0) * 2**20 * (1 - _DRIVER_TOLERANCE)
        yield expected.mismatch(
            "gpu-memory" if (twin or kind is None) and less else "gpu-type",
            node.host,
            declared=f"{expected.gpu.name} ({expected.memory_bytes / GIB:.1f} GiB)",
            found=f"{count} x {name} ({memory / GIB:.1f} GiB)",
            cure=cure,
        )


def _no_gpu(expected: Expected, node: NodeFacts) -> Mismatch:
    driver = f"driver {node.driver}" if node.driver else "no NVIDIA driver that answers"
    return expected.mismatch(
        "gpu-count",
        node.host,
        declared=f"{expected.pool.gpus_per_node} x {expected.gpu.name}",
        found=f"no GPU ({'; '.join(node.problems) or driver})",
        cure="`nvidia-smi` must list them on the host: install or reload the driver, pass "
        "the devices into the container; or take the node out of the pool",
    )


def _capability(expected: Expected, node: NodeFacts, gpu: GpuFacts) -> Iterator[Mismatch]:
    """A card with a name that is not its own, or an entry of the catalogue that is wrong."""
    declared = expected.gpu.compute_capability
    if gpu.compute_capability in ("", f"{declared}"):
        return
    yield expected.mismatch(
        "compute-capability",
        node.host,
        declared=f"{expected.gpu.name}, compute capability {declared}",
        found=f"GPU {gpu.index} ({gpu.name}): {gpu.compute_capability}",
        cure=f"the card is not what its name says, and kernels for {expected.gpu.name} would not "
        "run on it: take it out, or correct configs/gpus/",
    )


def _memory(expected: Expected, node: NodeFacts, gpu: GpuFacts) -> Iterator[Mismatch]:
    measured = gpu.torch_memory_bytes is not None
    tolerance = _MEMORY_TOLERANCE if measured else 0.0
    said = expected.pool.memory_gib_per_gpu is not None
    if not (measured or said) or gpu.seen_bytes >= expected.memory_bytes * (1 - tolerance):
        return
    yield expected.mismatch(
        "gpu-memory",
        node.host,
        declared=f"{expected.memory_bytes / GIB:.2f} GiB per GPU",
        found=f"GPU {gpu.index} ({gpu.name}): {gpu.seen_bytes / GIB:.2f} GiB",
        cure=f"set memory_gib_per_gpu: {gpu.seen_bytes / GIB:.1f}",
    )


def _pcie(expected: Expected, node: NodeFacts, gpu: GpuFacts) -> Iterator[Mismatch]:
    if gpu.pcie_width is None or gpu.pcie_max_generation is None:
        return
    there = _LANE.get(gpu.pcie_max_generation, _LANE[6]) * gpu.pcie_width
    declared = expected.gpu.pcie_bytes_per_s
    if there >= _HALF * declared:
        return
    yield expected.mismatch(
        "pcie-width",
        node.host,
        declared=f"{declared / 1e9:.0f} GB/s, as {expected.gpu.name} has with 16 lanes",
        found=f"GPU {gpu.index} on x{gpu.pcie_width} of generation {gpu.pcie_max_generation}: "
        f"{there / 1e9:.0f} GB/s",
        cure="move the card to an x16 slot that is wired to the CPU, check riser and BIOS "
        "bifurcation; tensor parallelism without NVLink will be slow until then",
        severity="error" if there < _QUARTER * declared else "warning",
    )


def _ecc(expected: Expected, node: NodeFacts, gpu: GpuFacts) -> Iterator[Mismatch]:
    where = f"GPU {gpu.index} ({gpu.uuid})"
    if gpu.uncorrected_errors or gpu.remapping:
        rows = f", row remapping {gpu.remapping}" if gpu.remapping else ""
        failed = gpu.remapping == "failed"
        yield expected.mismatch(
            "ecc-errors",
            node.host,
            declared="sound memory",
            found=f"{where}: {gpu.uncorrected_errors} uncorrected errors{rows}",
            cure="have the card replaced"
            if failed
            else "drain the node and reset the GPU "
            f"(`nvidia-smi --gpu-reset -i {gpu.index}`); if errors come back, replace the card",
        )
    elif gpu.ecc is False and not gpu.name.startswith("NVIDIA GeForce"):
        yield expected.mismatch(
            "ecc-off",
            node.host,
            declared=f"{expected.gpu.name} with ECC",
            found=f"{where}: ECC is off, so that memory errors go unseen",
            cure=f"`nvidia-smi -i {gpu.index} -e 1` and a reset",
            severity="warning",
        )


def _mig(expected: Expected, node: NodeFacts, own: Sequence[GpuFacts]) -> Iterator[Mismatch]:
    for gpu in own:
        if gpu.mig:
            slices = ", ".join(each.profile or "?" for each in gpu.mig_slices) or "no slice"
            profile = next((each.profile for each in gpu.mig_slices if each.profile), "3g.40gb")
            yield expected.mismatch(
                "mig-on",
                node.host,
                declared=f"whole GPUs ({expected.gpu.name})",
                found=f"GPU {gpu.index} is cut by MIG: {slices}",
                cure=f"`nvidia-smi -i {gpu.index} -mig 0`; or declare the slices as a pool "
                f"with gpu: {slice_name(expected.gpu.name, profile)}",
            )


def _slices(expected: Expected, node: NodeFacts, catalogue: Catalogue) -> Iterator[Mismatch]:
    if not node.gpus:
        yield _no_gpu(expected, node)
        return
    cut = [
        (slice_name(kind.name, each.profile), each, gpu)
        for gpu in node.gpus
        if (kind := gpu_type_of(gpu.name, gpu.memory_bytes, catalogue))
        for each in gpu.mig_slices
    ]
    present = Counter(name for name, _, _ in cut)
    own = [(each, gpu) for name, each, gpu in cut if name == expected.gpu.name]
    if len(own) != expected.pool.gpus_per_node:
        listed = ", ".join(f"{count} x {name}" for name, count in sorted(present.items()))
        yield expected.mismatch(
            "gpu-count",
            node.host,
            declared=f"{expected.pool.gpus_per_node} x {expected.gpu.name}",
            found=listed or "no MIG slice",
            cure="make the slices (`nvidia-smi mig -cgi PROFILE -C`), or set gpu and "
            "gpus_per_node to what is there",
        )
    least = min((each.memory_bytes for each, _ in own), default=expected.memory_bytes)
    if expected.pool.memory_gib_per_gpu is not None and least < expected.memory_bytes:
        yield expected.mismatch(
            "gpu-memory",
            node.host,
            declared=f"{expected.memory_bytes / GIB:.2f} GiB per slice",
            found=f"{least / GIB:.2f} GiB",
            cure=f"set memory_gib_per_gpu: {least // (GIB // 10) / 10:.1f}",
        )
    for gpu in {gpu.index: gpu for _, gpu in own}.values():
        yield from _ecc(expected, node, gpu)
