"""What this machine lacks to be a dozen hosts, for the time of a benchmark. For root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loadtests.processes import CannotRun


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


def first_of_all(pids: Iterable[int]) -> None:
    """Give the sessions of these processes CPU before those of others.

    Linux gives each session as much as any other, whatever the niceness of its processes (man 7
    sched, autogroups). A lab host is one: the head's, which would have cores of its own, had to do
    with a thirteenth of two.
    """
    for pid in pids:
        with suppress(OSError):  # it has ended, or the kernel makes no groups
            (Path("/proc") / str(pid) / "autogroup").write_text("-20")
