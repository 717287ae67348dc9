"""How much memory of this host a new process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil


def available_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """What the machine has left, or less where a control group (a container) limits this process."""
    return min([psutil.virtual_memory().available, *_left_in_groups(cgroups)])


def limits_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Of the control groups (a container, a slice) that this process is in; those without have none."""
    return [limit for limit, _ in _limited(cgroups)]


def _left_in_groups(cgroups: Path) -> list[int]:
    return [
        max(0, limit - int((folder / "memory.current").read_text()) + _given_up(folder))
        for limit, folder in _limited(cgroups)
        if (folder / "memory.current").exists()
    ]


def _limited(cgroups: Path) -> list[tuple[int, Path]]:
    """This process's group and those above it (control groups v2; others have no such files)."""
    found = []
    group = cgroups / _own_group().lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(cgroups):
            break
        limit = folder / "memory.max"
        text = limit.read_text().strip() if limit.exists() else "max"
        if text != "max":
            found.append((int(text), folder))
    return found


def _own_group() -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            return path
    return "/"


def _given_up(group: Path) -> int:
    """Bytes of files in memory that the kernel drops when it needs room."""
    statistics = group / "memory.stat"
    if not statistics.exists():
        return 0
    values = dict(line.split() for line in statistics.read_text().splitlines())
    return int(values.get("inactive_file", 0))
