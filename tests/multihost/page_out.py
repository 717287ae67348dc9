"""Memory that a process does not look at goes to swap before it is missed, not when it is."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

_PROCESS_MADVISE = 440  # on every architecture since Linux 5.10
_MADV_PAGEOUT = 21
_RANGES_AT_ONCE = 512  # the kernel takes 1024


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("size", ctypes.c_size_t))


def page_out(pid: int) -> None:
    """Write what only this process holds in memory to swap; it reads back what it still needs.

    Raises:
        OSError: it has ended, or may not be asked to (root may).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    ranges = list(_own_memory(pid))
    process = os.pidfd_open(pid)
    try:
        for begin in range(0, len(ranges), _RANGES_AT_ONCE):
            part = ranges[begin : begin + _RANGES_AT_ONCE]
            array = (_Range * len(part))(*part)
            count = ctypes.c_size_t(len(part))
            done = libc.syscall(
                _PROCESS_MADVISE, process, array, count, _MADV_PAGEOUT, ctypes.c_uint(0)
            )
            if done < 0:
                number = ctypes.get_errno()
                raise OSError(number, f"process_madvise of {pid}: {os.strerror(number)}")
    finally:
        os.close(process)


def take_what_waits(gib: float) -> None:
    """Have so much memory for a moment, so that it is free afterwards.

    What was written to swap stays in memory as well until somebody asks for room: everybody at once,
    if it is nobody before. Nothing to have, 0 or less, changes nothing.
    """
    size = int(gib * 2**30)
    if size > 0:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        mmap.mmap(-1, size, flags=flags).close()


def _own_memory(pid: int) -> Iterator[tuple[int, int]]:
    """Start and size of what is writable, private and of no file."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, end = (int(each, 16) for each in place.split("-"))
            yield start, end - start
