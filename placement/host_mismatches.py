"""What a pool says of its hosts, against a host: memory, disk, network, driver, clock, labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from placement.mismatch import GIB, Expected, Mismatch
from placement.node_facts import NodeFacts

_MEMORY_TOLERANCE = 0.05  # firmware and kernel keep a few per cent for themselves
_CLOCK_WARNING_S = 1.0
_CLOCK_ERROR_S = 30.0  # tokens, budgets and logs are off by then
_NIC_TOLERANCE = 0.9
_SPARE_DISK = 1.05
# Oldest Linux driver for a CUDA major version (CUDA release notes, minor version compatibility).
_DRIVERS: Mapping[int, tuple[int, ...]] = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
_ZONE_LABELS = ("zone", "ray.io/availability-zone")
_SAME_EVERYWHERE = ("bora", "ray", "python", "vllm", "torch")


def of_node(expected: Expected, node: NodeFacts) -> list[Mismatch]:
    """Everything but its GPUs."""
    return [
        *_memory(expected, node),
        *_disk(expected, node),
        *_driver(expected, node),
        *_clock(expected, node),
        *_labels(expected, node),
        *_network(expected, node),
    ]


def differing_versions(found: Sequence[NodeFacts]) -> Iterator[Mismatch]:
    """Hosts whose packages differ from what most hosts have."""
    for package in _SAME_EVERYWHERE:
        versions = Counter(node.versions.get(package, "") for node in found)
        versions.pop("", None)
        if len(versions) < 2:
            continue
        usual = max(versions, key=lambda version: (versions[version], version))
        for node in found:
            version = node.versions.get(package, "")
            if version not in ("", usual):
                yield Mismatch(
                    rule="version-differs",
                    host=node.host,
                    pool=node.pool,
                    declared=f"{package} {usual}, as on {versions[usual]} of {len(found)} hosts",
                    found=f"{package} {version}",
                    cure="install the same lock file on all hosts (`ray up` again does)",
                    severity="error" if package in ("bora", "ray") else "warning",
                )


def _memory(expected: Expected, node: NodeFacts) -> Iterator[Mismatch]:
    declared = expected.pool.host_memory_gib
    key = "host_memory_gib"
    if declared is None and expected.is_cpu:
        declared = (expected.pool.memory_gib_per_gpu or 0) * expected.pool.gpus_per_node
        key = "memory_gib_per_gpu x gpus_per_node"
    there = node.host_memory_bytes / GIB
    if declared is None or there >= declared * (1 - _MEMORY_TOLERANCE):
        return
    yield expected.mismatch(
        "host-memory",
        node.host,
        declared=f"{declared:g} GiB ({key})",
        found=f"{there:.1f} GiB",
        cure=f"set {key} to {there:.0f}; in a container raise its memory limit; on bare metal "
        "look for a module that failed (`dmidecode -t memory`)",
    )


def _disk(expected: Expected, node: NodeFacts) -> Iterator[Mismatch]:
    if node.disk is None:
        return
    cached = node.disk.cached
    lacking = {
        repo: size - cached.get(repo, 0)
        for repo, size in expected.checkpoints.items()
        if size > cached.get(repo, 0) * _SPARE_DISK
    }
    needed = int(sum(lacking.values()) * _SPARE_DISK)
    if needed > node.disk.free_bytes:
        yield expected.mismatch(
            "disk-too-small",
            node.host,
            declared=f"room for {', '.join(sorted(lacking))}: {needed / GIB:.1f} GiB",
            found=f"{node.disk.free_bytes / GIB:.1f} GiB free of "
            f"{node.disk.total_bytes / GIB:.1f} in {node.disk.path}",
            cure="free or add disk there, or put the cache (HF_HOME) on a larger one",
        )


def _driver(expected: Expected, node: NodeFacts) -> Iterator[Mismatch]:
    cuda = _numbers(node.versions.get("cuda", ""))
    driver = _numbers(node.driver)
    if expected.is_cpu or not cuda or not driver:
        return
    oldest = _DRIVERS.get(cuda[0], _DRIVERS[max(_DRIVERS)])
    if driver < oldest:
        engine = f"torch {node.versions.get('torch', '?')} (CUDA {node.versions['cuda']})"
        wanted = ".".join(f"{part:02d}" for part in oldest)
        yield expected.mismatch(
            "driver-too-old",
            node.host,
            declared=f"{engine}, which needs driver {wanted} or later",
            found=f"driver {node.driver}",
            cure=f"install driver {oldest[0]} or later, or an engine built for an older CUDA",
        )


def _clock(expected: Expected, node: NodeFacts) -> Iterator[Mismatch]:
    if node.clock_offset_s is None:
        return
    sure = abs(node.clock_offset_s) - node.clock_error_s
    if sure > _CLOCK_WARNING_S:
        side = "ahead" if node.clock_offset_s > 0 else "behind"
        yield expected.mismatch(
            "clock-skew",
            node.host,
            declared="one time on all hosts",
            found=f"its clock is {abs(node.clock_offset_s):.1f} s {side} of the head's",
            cure="run chrony or systemd-timesyncd there (`timedatectl set-ntp true`)",
            severity="error" if sure > _CLOCK_ERROR_S else "warning",
        )


def _labels(expected: Expected, node: NodeFacts) -> Iterator[Mismatch]:
    for key, declared in sorted(expected.pool.labels.items()):
        if key == "amx":
            yield from _amx(expected, node, declared)
            continue
        keys = _ZONE_LABELS if key == "zone" else (key,)
        there = next((node.labels[each] for each in keys if each in node.labels), None)
        # A host that was asked without Ray has no labels at all.
        if there != declared and node.labels:
            move = f"move the node to a pool with {key}: {there}, or " if there else ""
            yield expected.mismatch(
                "label-wrong",
                node.host,
                declared=f"{key}: {declared}",
                found=f"{key}: {there}" if there else f"no label {key}",
                cure=f"{move}restart its Ray node with `--labels {key}={declared}`",
                severity="error" if there else "warning",
            )


def _amx(expected: Expected, node: NodeFacts, declared: str) -> Iterator[Mismatch]:
    """What a plan takes for the speed of slots."""
    if declared.lower() == "true" and "amx_bf16" not in node.cpu_features and node.cpu:
        yield expected.mismatch(
            "label-wrong",
            node.host,
            declared="amx: true",
            found=f"{node.cpu}, which does not show amx_bf16",
            cure="take the label amx out of the pool; in a virtual machine pass the CPU through",
        )


def _network(expected: Expected, node: NodeFacts) -> Iterator[Mismatch]:
    declared = expected.pool.links.inter_gbps
    speeds = [nic.gbps for nic in node.nics if nic.gbps]
    if declared is None or not speeds or sum(speeds) >= declared * _NIC_TOLERANCE:
        return
    listed = ", ".join(f"{nic.name} {nic.gbps:g}" for nic in node.nics if nic.gbps)
    yield expected.mismatch(
        "network-slow",
        node.host,
        declared=f"{declared:g} Gbit/s",
        found=f"{sum(speeds):g} Gbit/s ({listed})",
        cure=f"check cables and switch ports (`ethtool`), or set links: {{inter_gbps: "
        f"{sum(speeds):g}}}",
        severity="warning",
    )


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()
