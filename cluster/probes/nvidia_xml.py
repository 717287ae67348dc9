"""From what `nvidia-smi` prints to `GpuFacts`. Text in, values out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree as ET

from placement.node_facts import GpuFacts, MigSlice

_GPU_LINE = re.compile(r"GPU (\d+): .*\(UUID: ([^)]+)\)")
_MIG_LINE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: ([^)]+)\)")
_MIB = 2**20
_LOG = ("<nvidia_smi_log", "</nvidia_smi_log>")
# What stands where a value should, for a GPU that fell off the bus, needs a reset, or has no such.
_NO_NAME = (
    "",
    "err!",
    "n/a",
    "not supported",
    "unknown error",
    "gpu is lost",
    "gpu requires reset",
)
_NEEDED = ("product_name", "uuid", "fb_memory_usage/total")
_UNCORRECTED = (
    "dram_uncorrectable", "sram_uncorrectable",
    "sram_uncorrectable_parity", "sram_uncorrectable_secded",
)  # fmt: skip


class UnreadableDriverOutput(ValueError):
    """`nvidia-smi` printed something else than its XML; the text's beginning is in the message."""


def parse_log(
    text: str, *, listing: str = "", capabilities: Mapping[str, str] | None = None
) -> tuple[str, tuple[GpuFacts, ...], tuple[str, ...]]:
    """Driver version, GPUs and problems out of `nvidia-smi -q -x`.

    `listing` (of `nvidia-smi -L`) names MIG profiles and their UUIDs, which the XML lacks;
    `capabilities` are compute capabilities by UUID, which it lacks too. A GPU or MIG slice without
    name, UUID or memory is no GPU but a problem; the others keep their index.

    Raises:
        UnreadableDriverOutput: it is not that XML.
    """
    log, problems = _split(text)
    try:
        root = ET.fromstring(log)  # noqa: S314 - printed by the driver's own tool
    except ET.ParseError as error:
        raise UnreadableDriverOutput(f"nvidia-smi -q -x: {error}: {text[:200]!r}") from None
    slices, gpus = _listed_slices(listing), []
    nodes = root.findall("gpu")
    for index, node in enumerate(nodes):
        if fault := _fault(index, node):
            problems.append(fault)
            continue
        if asked := _recovery(index, node):
            problems.append(asked)
        gpus.append(_gpu(index, node, slices, capabilities or {}, problems))
    attached = _known(root, "attached_gpus")
    if attached is not None and attached != len(nodes):
        problems.append(f"{attached} GPUs are attached, the driver describes {len(nodes)} of them")
    return root.findtext("driver_version", "").strip(), tuple(gpus), tuple(problems)


def is_log(text: str) -> bool:
    """Whether that XML is in it, whatever else was printed."""
    return all(mark in text for mark in _LOG)


def _split(text: str) -> tuple[str, list[str]]:
    """The log, and the warnings (a corrupted infoROM, a GPU that is lost) before and after it."""
    if not is_log(text):
        return text, []
    begin, end = text.index(_LOG[0]), text.rindex(_LOG[1]) + len(_LOG[1])
    around = f"{text[:begin]}\n{text[end:]}".splitlines()
    said = [line.strip() for line in around if not line.lstrip().startswith(("<?xml", "<!DOCTYPE"))]
    return text[begin:end], [f"nvidia-smi: {line}" for line in said if line]


def _fault(index: int, node: ET.Element) -> str:
    """Why this is no GPU to count on; empty: it is one."""
    name, uuid, memory = (node.findtext(path, "").strip() for path in _NEEDED)
    sound = (
        name.strip("[]").lower() not in _NO_NAME,
        uuid.startswith("GPU-"),
        _mebibytes(memory) > 0,
    )
    if all(sound):
        return ""
    said = zip(_NEEDED, (name, uuid, memory), sound, strict=True)
    bad = ", ".join(f"{path} {text!r}" for path, text, is_sound in said if not is_sound)
    return (
        f"GPU {index} ({node.get('id', '?')}) cannot be used: nvidia-smi prints {bad}; look in "
        f"`dmesg` for Xid errors (a GPU that fell off the bus), reset it or reboot"
    )


def _recovery(index: int, node: ET.Element) -> str:
    """What the driver itself asks for, since release 565; empty: nothing."""
    action = node.findtext("gpu_recovery_action", "").strip()
    if action.strip("[]").lower() in ("", "none", "n/a"):
        return ""
    return f"GPU {index} ({node.get('id', '?')}): the driver asks for {action!r} to recover it"


def parse_capabilities(text: str) -> dict[str, str]:
    """`nvidia-smi --query-gpu=uuid,compute_cap --format=csv,noheader` by UUID."""
    pairs = (line.split(",", 1) for line in text.splitlines() if "," in line)
    return {uuid.strip(): capability.strip() for uuid, capability in pairs}


def _gpu(
    index: int,
    node: ET.Element,
    slices: Mapping[tuple[str, int], tuple[str, str]],
    capabilities: Mapping[str, str],
    problems: list[str],
) -> GpuFacts:
    """What it tells. Slices that are none to count on are told to `problems`."""
    uuid = node.findtext("uuid", "").strip()
    ecc = node.findtext("ecc_mode/current_ecc", "N/A").strip()
    volatile = node.find("ecc_errors/volatile")
    link = "pci/pci_gpu_link_info"
    return GpuFacts(
        index=index,
        name=node.findtext("product_name", "").strip(),
        uuid=uuid,
        memory_bytes=_memory(node, "total"),
        used_bytes=_memory(node, "used"),
        compute_capability=capabilities.get(uuid, ""),
        pcie_max_generation=_known(node, f"{link}/pcie_gen/max_link_gen"),
        pcie_generation=_known(node, f"{link}/pcie_gen/current_link_gen"),
        pcie_width=_known(node, f"{link}/link_widths/current_link_width"),
        pcie_max_width=_known(node, f"{link}/link_widths/max_link_width"),
        ecc={"Enabled": True, "Disabled": False}.get(ecc),
        uncorrected_errors=sum(_number(volatile, name) for name in _UNCORRECTED),
        remapping=_remapping(node),
        mig=node.findtext("mig_mode/current_mig", "").strip() == "Enabled",
        mig_slices=tuple(_slices(index, uuid, node, slices, problems)),
    )


def _slices(
    index: int,
    gpu: str,
    node: ET.Element,
    listed: Mapping[tuple[str, int], tuple[str, str]],
    problems: list[str],
) -> Iterator[MigSlice]:
    for order, part in enumerate(node.iterfind("mig_devices/mig_device")):
        number = _known(part, "index")
        number = order if number is None else number
        profile, listed_uuid = listed.get((gpu, number), ("", ""))
        uuid, size = part.findtext("uuid", "").strip(), _memory(part, "total")
        uuid = uuid if uuid.startswith("MIG-") else listed_uuid
        if uuid and size:
            yield MigSlice(profile=profile, uuid=uuid, memory_bytes=size)
        else:
            lacks = "memory" if uuid else "UUID"
            problems.append(f"GPU {index}: the driver tells no {lacks} of its MIG slice {number}")


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
    """Of rows (Ampere and later) or pages (before); of SRAM whether NVIDIA's threshold is passed."""
    states = {
        "remapped_rows/remapped_row_failure": "failed",
        "ecc_errors/aggregate/sram_threshold_exceeded": "failed",
        "remapped_rows/remapped_row_pending": "pending",
        "retired_pages/pending_retirement": "pending",
    }
    said = (state for path, state in states.items() if node.findtext(path, "").strip() == "Yes")
    return next(said, "")


def _known(node: ET.Element | None, path: str) -> int | None:
    """The number at the start of a text such as `16x` or `81559 MiB`; None for `N/A`."""
    text = "" if node is None else node.findtext(path, "")
    match = re.match(r"\s*(\d+)", text)
    return int(match[1]) if match else None


def _number(node: ET.Element | None, path: str) -> int:
    return _known(node, path) or 0


def _memory(node: ET.Element, what: str) -> int:
    """Bytes; 0 where the driver does not tell."""
    return _mebibytes(node.findtext(f"fb_memory_usage/{what}", "")) * _MIB


def _mebibytes(text: str) -> int:
    """Of `81559 MiB`; 0 for anything else, another unit too."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*MiB\s*", text)
    return int(match[1]) if match else 0
