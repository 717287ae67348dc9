"""Numbers that all workers of a gateway see: a memory-mapped file and the lock that guards it.

slot: 64 bytes of name (zero: free), NUM_CELLS doubles
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway.errors import GatewayError

NUM_CELLS = 8
_NAME_BYTES = 64
_SLOT_BYTES = _NAME_BYTES + 8 * NUM_CELLS
_NUM_SLOTS = 8192


class FileLock:
    """Held by one process at a time, for a few microseconds. Not for threads."""

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


class SharedCells:
    """Every tenant's cells in one file, made when it is not there. `close` lets go of it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(self._descriptor, _NUM_SLOTS * _SLOT_BYTES)  # what is new reads as zeros
        self._memory = mmap.mmap(self._descriptor, _NUM_SLOTS * _SLOT_BYTES)
        self._view = memoryview(self._memory)
        self._cells: dict[str, memoryview[float]] = {}
        self.lock = FileLock(self._descriptor)

    def cells(self, name: str) -> memoryview[float]:
        """The cells of `name`, the same in every process."""
        cells = self._cells.get(name)
        if cells is None:
            start = self._slot(name.encode()) * _SLOT_BYTES
            numbers = self._view[start + _NAME_BYTES : start + _SLOT_BYTES]
            cells = self._cells[name] = numbers.cast("d")
        return cells

    def close(self) -> None:
        """Unmap the file."""
        for cells in self._cells.values():
            cells.release()
        self._cells.clear()
        self._view.release()
        self._memory.close()
        os.close(self._descriptor)

    def _slot(self, name: bytes) -> int:
        wanted = name.ljust(_NAME_BYTES, b"\0")
        with self.lock:
            for slot in range(_NUM_SLOTS):
                start = slot * _SLOT_BYTES
                held = bytes(self._view[start : start + _NAME_BYTES])
                if held == wanted:
                    return slot
                if not held[0]:
                    self._view[start : start + _NAME_BYTES] = wanted
                    return slot
        raise GatewayError(
            f"more than {_NUM_SLOTS} tenants have come and gone; restart the gateway"
        )
