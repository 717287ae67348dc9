"""What a pool says of the links between its GPUs, against the pairs of GPUs of a node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from placement.mismatch import Expected, Mismatch
from placement.node_facts import NodeFacts, PairFacts

_FAR_LESS = 0.3  # of PCIe's bandwidth
# Of NVLink's: a copy that is timed reaches 80 %, over half the links 40 %.
_LINKS_LOST = 0.5


def of_pairs(expected: Expected, node: NodeFacts, pairs: Sequence[PairFacts]) -> Iterator[Mismatch]:
    """Of GPUs of the pool: how they are joined, and what arrives."""
    if expected.link not in ("nvlink", "pcie"):
        return
    apart = [pair for pair in pairs if pair.path and not pair.path.startswith("NV")]
    if expected.link == "nvlink" and apart:
        yield expected.mismatch(
            "nvlink-missing",
            node.host,
            declared="NVLink between all GPUs",
            found=f"{_listed(apart)}: {apart[0].path}, over PCIe",
            cure="check bridges and `nvidia-smi nvlink --status` (on HGX boards the "
            "fabric manager must run); or set links: {intra: pcie}",
        )
    else:
        barred = [pair for pair in pairs if pair.peer and pair.peer != "OK"]
        if barred:
            yield expected.mismatch(
                "p2p-unavailable",
                node.host,
                declared=f"peer access ({expected.link})",
                found=f"{_listed(barred)}: {barred[0].peer}, copies go through host memory",
                cure="set links: {intra: pcie-no-p2p}; or allow it: IOMMU and ACS off, a driver "
                "that does not bar it",
            )
    yield from _copies(expected, node, pairs)


def _copies(expected: Expected, node: NodeFacts, pairs: Sequence[PairFacts]) -> Iterator[Mismatch]:
    wrong = [pair for pair in pairs if pair.copy_correct is False]
    if wrong:
        yield expected.mismatch(
            "p2p-wrong-copies",
            node.host,
            declared=f"peer access ({expected.link})",
            found=f"{_listed(wrong)}: what arrives differs from what was sent",
            cure="turn IOMMU and PCIe ACS off (`iommu=off`), or set NCCL_P2P_DISABLE=1 and "
            "links: {intra: pcie-no-p2p}; until then answers would be wrong",
        )
    declared = expected.gpu.pcie_bytes_per_s
    if expected.link == "nvlink":
        declared = expected.gpu.nvlink_bytes_per_s
    least = (_LINKS_LOST if expected.link == "nvlink" else _FAR_LESS) * declared
    slow = [pair for pair in pairs if (pair.copy_bytes_per_s or declared) < least]
    if slow and not wrong:
        yield expected.mismatch(
            "link-slow",
            node.host,
            declared=f"{declared / 1e9:.0f} GB/s between GPUs ({expected.link})",
            found=f"{_listed(slow)}: {(slow[0].copy_bytes_per_s or 0) / 1e9:.1f} GB/s",
            cure="see that nothing else used the GPUs; then `nvidia-smi nvlink --status` (links that "
            "are inactive), `nvidia-smi topo -m` and the cables",
            severity="warning",
        )


def _listed(pairs: Sequence[PairFacts]) -> str:
    shown = ", ".join(f"GPU {pair.first} and {pair.second}" for pair in pairs[:3])
    return shown if len(pairs) <= 3 else f"{shown} and {len(pairs) - 3} more pairs"
