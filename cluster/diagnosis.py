"""From what hosts say to what is wrong with them: values in, checks out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from cluster.host_state import HostState
from cluster.priority import VARIABLE as PRIORITY
from placement.mismatch import GIB, Mismatch
from placement.node_facts import NodeFacts
from placement.spec import Spec

Status = Literal["ok", "warning", "failed", "skipped"]
# What a mismatch is about, where `bora doctor` has a row for it.
ROWS = {
    "gpu-count": "GPUs", "gpu-type": "GPUs", "gpu-memory": "GPUs", "gpu-unusable": "GPUs",
    "mig-on": "GPUs", "ecc-errors": "GPUs", "ecc-off": "GPUs", "pcie-width": "GPUs",
    "nvlink-missing": "P2P", "p2p-unavailable": "P2P", "p2p-wrong-copies": "P2P",
    "link-slow": "P2P", "host-memory": "memory", "disk-too-small": "disk",
    "gpu-memory-taken": "GPUs", "gpu-memory-slow": "GPUs", "host-copies-slow": "GPUs",
    "compute-capability": "GPUs", "gpu-counted-twice": "GPUs", "disk-slow": "disk",
    "driver-too-old": "driver", "clock-skew": "clock", "label-wrong": "labels",
    "network-slow": "network", "version-differs": "versions", "node-missing": "node",
}  # fmt: skip
_NEEDED = ("bora", "ray", "torch", "vllm")
_MIN_DISK_BYTES = 2 * GIB
_FEW_DISK_BYTES = 50 * GIB  # a checkpoint of 24 billion parameters in BF16
_SLOW_DISK = 200e6  # bytes/s; 50 GB take four minutes
_MIN_SHARED_BYTES = GIB
_MIN_OPEN_FILES = 8192


class Check(Spec):
    """One thing that was looked at on one host."""

    host: str
    check: str
    status: Status
    found: str
    cure: str = ""


class Diagnosis(Spec):
    """`bora doctor --json`."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing failed; warnings do not count."""
        return all(check.status != "failed" for check in self.checks)


def diagnose(
    hosts: Iterable[tuple[NodeFacts, HostState | None]],
    lies: Sequence[Mismatch],
    others: Sequence[Check] = (),
) -> Diagnosis:
    """All rows, by host. `lies`: where hosts differ from what is declared; they replace an `ok`.

    `others`: what was found out on the way to the hosts (ssh, labels).
    """
    rows = [*others]
    for facts, state in hosts:
        rows += _facts_checks(facts)
        rows += _state_checks(facts.host, state) if state is not None else []
    bad = [_of_lie(lie) for lie in lies]
    covered = {(check.host, check.check) for check in bad}
    kept = [row for row in rows if row.status != "ok" or (row.host, row.check) not in covered]
    order = {"failed": 0, "warning": 1, "ok": 2, "skipped": 3}
    unique = dict.fromkeys((*kept, *bad))  # Ray nodes that share a host say the same twice
    return Diagnosis(checks=tuple(sorted(unique, key=lambda row: (row.host, order[row.status]))))


def _of_lie(lie: Mismatch) -> Check:
    return Check(
        host=lie.host,
        check=ROWS.get(lie.rule, lie.rule),
        status="failed" if lie.severity == "error" else "warning",
        found=f"{lie.rule}: declared {lie.declared}; found {lie.found}",
        cure=lie.cure,
    )


def _facts_checks(facts: NodeFacts) -> list[Check]:
    return [
        _driver(facts),
        _gpus(facts),
        _peers(facts),
        _versions(facts),
        *_disk(facts),
        Check(
            host=facts.host,
            check="memory",
            status="ok",
            found=f"{facts.host_memory_bytes / GIB:.1f} GiB, {facts.cores} cores",
        ),
        _speeds(facts),
    ]


def _driver(facts: NodeFacts) -> Check:
    if facts.problems:
        cure = "see that `nvidia-smi` works there: reload the driver, reboot, look in `dmesg`"
        return _row(facts, "driver", "failed", "; ".join(facts.problems), cure)
    if not facts.driver:
        return _row(facts, "driver", "skipped", "no NVIDIA driver: engines run on the CPU")
    return _row(facts, "driver", "ok", f"driver {facts.driver}")


def _gpus(facts: NodeFacts) -> Check:
    if not facts.gpus:
        return _row(facts, "GPUs", "skipped", "none")
    names = dict.fromkeys(gpu.name for gpu in facts.gpus)
    counts = [f"{sum(gpu.name == name for gpu in facts.gpus)} x {name}" for name in names]
    return _row(facts, "GPUs", "ok", ", ".join(counts))


def _peers(facts: NodeFacts) -> Check:
    measured = [pair for pair in facts.pairs if pair.copy_correct is not None]
    wrong = [pair for pair in measured if not pair.copy_correct]
    if wrong:
        pairs = ", ".join(f"{pair.first}-{pair.second}" for pair in wrong)
        cure = "turn IOMMU and PCIe ACS off, or set NCCL_P2P_DISABLE=1"
        return _row(facts, "P2P", "failed", f"copies arrive wrong between GPUs {pairs}", cure)
    if measured:
        slowest = min(pair.copy_bytes_per_s or 0 for pair in measured) / 1e9
        found = f"{len(measured)} pairs copy rightly, the slowest at {slowest:.1f} GB/s"
        return _row(facts, "P2P", "ok", found)
    if facts.pairs:
        return _row(facts, "P2P", "skipped", f"{len(facts.pairs)} pairs, not measured")
    return _row(facts, "P2P", "skipped", "fewer than two GPUs")


def _versions(facts: NodeFacts) -> Check:
    listed = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    missing = [name for name in _NEEDED if name not in facts.versions]
    if missing:
        cure = "install the lock file there (`make install`, or `ray up` again)"
        return _row(facts, "versions", "failed", f"no {', '.join(missing)}; {listed}", cure)
    return _row(facts, "versions", "ok", listed)


def _disk(facts: NodeFacts) -> list[Check]:
    disk = facts.disk
    if disk is None:
        return []
    speed = "" if disk.read_bytes_per_s is None else f", {disk.read_bytes_per_s / 1e6:.0f} MB/s"
    found = f"{disk.free_bytes / GIB:.1f} GiB free in {disk.path}{speed}"
    cure = "free or add disk, or put HF_HOME on a larger or faster one"
    status: Status = "ok"
    if disk.free_bytes < _MIN_DISK_BYTES:
        status = "failed"
    elif disk.free_bytes < _FEW_DISK_BYTES or (disk.read_bytes_per_s or _SLOW_DISK) < _SLOW_DISK:
        status = "warning"
    return [_row(facts, "disk", status, found, "" if status == "ok" else cure)]


def _speeds(facts: NodeFacts) -> Check:
    measured = facts.measured
    if measured is None:
        return _row(facts, "speeds", "skipped", "not measured")
    if measured.problem:
        cure = "run `bora probe` there when nothing uses its GPUs"
        return _row(facts, "speeds", "warning", measured.problem, cure)
    copied = (measured.copy_bytes_per_s or 0) / 1e9
    found = f"copies at {copied:.1f} GB/s in memory"
    if measured.all_reduce_s is not None:
        found += (
            f", all-reduce of 1 MiB over {measured.ranks} in {measured.all_reduce_s * 1e6:.0f} us"
        )
    return _row(facts, "speeds", "ok", found)


def _state_checks(host: str, state: HostState) -> list[Check]:
    rows = [_models(host, state), _clock(host, state), _priority(host, state)]
    return [*rows, *_limits(host, state), *_ports(host, state)]


def _models(host: str, state: HostState) -> Check:
    if not state.cache_writable:
        cure = "give bora's account the folder, or set HF_HOME"
        return Check(
            host=host, check="models", status="failed", found="the cache is read-only", cure=cure
        )
    if state.hub_problem:
        return Check(
            host=host,
            check="models",
            status="warning",
            found=f"{state.hub} cannot be reached: {state.hub_problem}",
            cure="only models that lie in the cache can be served; set HTTPS_PROXY, or "
            "HF_ENDPOINT to a mirror, or copy the cache there",
        )
    token = "with a token" if state.hub_token else "no token: gated models are refused (HF_TOKEN)"
    return Check(host=host, check="models", status="ok", found=f"{state.hub}, {token}")


def _clock(host: str, state: HostState) -> Check:
    if state.clock_synchronized is None:
        found = "nobody on the host can tell whether it is synchronized"
        return Check(host=host, check="clock", status="skipped", found=found)
    if state.clock_synchronized:
        return Check(host=host, check="clock", status="ok", found="synchronized")
    cure = "`timedatectl set-ntp true`, or run chrony"
    return Check(host=host, check="clock", status="warning", found="not synchronized", cure=cure)


def _priority(host: str, state: HostState) -> Check:
    found = f"processes of bora run at nice {state.niceness}"
    cure = f"start Ray there with {PRIORITY}=0, and not under `nice`: engines inherit it"
    return _limit(host, "priority", found, cure if state.niceness > 0 else "")


def _limits(host: str, state: HostState) -> list[Check]:
    rows = []
    shared = f"{state.shared_memory_bytes / GIB:.1f} GiB in /dev/shm"
    short = state.shared_memory_bytes < _MIN_SHARED_BYTES
    cure = "`docker run --shm-size 16g`, or remount /dev/shm larger: ranks talk through it"
    rows.append(_limit(host, "shared memory", shared, cure if short else ""))
    files = f"{state.open_files} open files"
    few = state.open_files < _MIN_OPEN_FILES
    cure = f"`ulimit -Hn {_MIN_OPEN_FILES}` or more: each stream of a gateway is a socket"
    rows.append(_limit(host, "open files", files, cure if few else ""))
    return rows


def _limit(host: str, check: str, found: str, cure: str) -> Check:
    status: Status = "warning" if cure else "ok"
    return Check(host=host, check=check, status=status, found=found, cure=cure)


def _ports(host: str, state: HostState) -> list[Check]:
    if not state.ports_in_use:
        return []
    taken = ", ".join(str(port) for port in state.ports_in_use)
    return [
        Check(
            host=host,
            check="ports",
            # With a Ray on the host it is most likely our own gateway that listens there.
            status="warning" if state.ray_running else "failed",
            found=f"in use: {taken}" + (" (Ray runs here)" if state.ray_running else ""),
            cure=f"see who listens (`ss -ltnp 'sport = :{state.ports_in_use[0]}'`) and stop it, or "
            "choose other ports (--http-port, --grpc-port, `gateway:` in the fleet)",
        )
    ]


def _row(facts: NodeFacts, check: str, status: Status, found: str, cure: str = "") -> Check:
    return Check(host=facts.host, check=check, status=status, found=found, cure=cure)
