"""From what `nvidia-smi` prints to `GpuFacts`. Text in, values out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree as ET

from placement.node_facts import GpuFacts, MigSlice

_GPU_LINE = re.compile(r"GPU (\d+): .*\(UUID: ([^)]+)\)")
_MIG_LINE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: ([^)]+)\)")
_MIB = 2**20
_UNCORRECTED = (
    "dram_uncorrectable", "sram_uncorrectable",
    "sram_uncorrectable_parity", "sram_uncorrectable_secded",
)  # fmt: skip


class UnreadableDriverOutput(ValueError):
    """`nvidia-smi` printed something else than its XML; the text's beginning is in the message."""


def parse_log(
    text: str, *, listing: str = "", capabilities: Mapping[str, str] | None = None
) -> tuple[str, tuple[GpuFacts, ...]]:
    """Driver version and GPUs out of `nvidia-smi -q -x`.

    `listing` (of `nvidia-smi -L`) names MIG profiles and their UUIDs, which the XML lacks;
    `capabilities` are compute capabilities by UUID, which it lacks too.

    Raises:
        UnreadableDriverOutput: it is not that XML.
    """
    try:
        root = ET.fromstring(text)  # noqa: S314 - printed by the driver's own tool
    except ET.ParseError as error:
        raise UnreadableDriverOutput(f"nvidia-smi -q -x: {error}: {text[:200]!r}") from None
    slices = _listed_slices(listing)
    driver = root.findtext("driver_version", "").strip()
    gpus = [
        _gpu(index, node, slices, capabilities or {}) for index, node in enumerate(root.iter("gpu"))
    ]
    return driver, tuple(gpus)


def parse_capabilities(text: str) -> dict[str, str]:
    """`nvidia-smi --query-gpu=uuid,compute_cap --format=csv,noheader` by UUID."""
    pairs = (line.split(",", 1) for line in text.splitlines() if "," in line)
    return {uuid.strip(): capability.strip() for uuid, capability in pairs}


def _gpu(
    index: int,
    node: ET.Element,
    slices: Mapping[tuple[str, int], tuple[str, str]],
    capabilities: Mapping[str, str],
) -> GpuFacts:
    uuid = node.findtext("uuid", "").strip()
    ecc = node.findtext("ecc_mode/current_ecc", "N/A").strip()
    volatile = node.find("ecc_errors/volatile")
    link = "pci/pci_gpu_link_info"
    return GpuFacts(
        index=index,
        name=node.findtext("product_name", "").strip(),
        uuid=uuid,
        memory_bytes=_number(node, "fb_memory_usage/total") * _MIB,
        used_bytes=_number(node, "fb_memory_usage/used") * _MIB,
        compute_capability=capabilities.get(uuid, ""),
        pcie_max_generation=_known(node, f"{link}/pcie_gen/max_link_gen"),
        pcie_generation=_known(node, f"{link}/pcie_gen/current_link_gen"),
        pcie_width=_known(node, f"{link}/link_widths/current_link_width"),
        pcie_max_width=_known(node, f"{link}/link_widths/max_link_width"),
        ecc={"Enabled": True, "Disabled": False}.get(ecc),
        uncorrected_errors=sum(_number(volatile, name) for name in _UNCORRECTED),
        remapping=_remapping(node),
        mig=node.findtext("mig_mode/current_mig", "").strip() == "Enabled",
        mig_slices=tuple(
            _slice(uuid, part, slices) for part in node.iterfind("mig_devices/mig_device")
        ),
    )


def _slice(
    gpu: str, node: ET.Element, slices: Mapping[tuple[str, int], tuple[str, str]]
) -> MigSlice:
    profile, uuid = slices.get((gpu, _number(node, "index")), ("", ""))
    return MigSlice(
        profile=profile,
        uuid=node.findtext("uuid", "").strip() or uuid,
        memory_bytes=_number(node, "fb_memory_usage/total") * _MIB,
    )


def _listed_slices(listing: str) -> dict[tuple[str, int], tuple[str, str]]:
    """Profile and UUID by the GPU's UUID and the slice's index."""
    found: dict[tuple[str, int], tuple[str, str]] = {}
    gpu = ""
    for line in listing.splitlines():
        if match := _GPU_LINE.match(line):
            gpu = match[2]
        elif match := _MIG_LINE.match(line):
            found[(gpu, int(match[2]))] = (match[1], match[3])
    return found


def _remapping(node: ET.Element) -> str:
    for state in ("failure", "pending"):
        if node.findtext(f"remapped_rows/remapped_row_{state}", "").strip() == "Yes":
            return "failed" if state == "failure" else state
    return ""


def _known(node: ET.Element | None, path: str) -> int | None:
    """The number at the start of a text such as `16x` or `81559 MiB`; None for `N/A`."""
    text = "" if node is None else node.findtext(path, "")
    match = re.match(r"\s*(\d+)", text)
    return int(match[1]) if match else None


def _number(node: ET.Element | None, path: str) -> int:
    return _known(node, path) or 0
