"""What this machine lacks to be a dozen hosts, for the time of a benchmark. For root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtests.processes import CannotRun

_AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


@contextmanager
def swap_file(file: Path, gib: float) -> Iterator[None]:
    """So much more room, 0 for none, in the new `file`.

    Raises:
        CannotRun: the file system or the kernel does not allow that.
    """
    if not gib:
        yield
        return
    made = [["fallocate", "-l", str(int(gib * 2**30)), str(file)], ["chmod", "600", str(file)]]
    for command in (*made, ["mkswap", str(file)], ["swapon", str(file)]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            said = result.stderr.strip()
            raise CannotRun(f"{' '.join(command)}: {said}; --swap-gib 0 does without swap")
    try:
        yield
    finally:
        subprocess.run(["swapoff", str(file)], check=True)


@contextmanager
def niceness_across_sessions() -> Iterator[None]:
    """Niceness counts among all processes of the machine, not within each session alone.

    Linux gives each session as much CPU as any other (man 7 sched, autogroups), and a lab host is a
    session: the head's, which would have cores of its own, had to do with a thirteenth of two.
    """
    if not _AUTOGROUP.exists():  # a kernel without it
        yield
        return
    before = _AUTOGROUP.read_text()
    _AUTOGROUP.write_text("0")
    try:
        yield
    finally:
        _AUTOGROUP.write_text(before)
