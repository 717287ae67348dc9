"""Token buckets over plain cells of numbers, which one process has to itself or several share.

    cells: [level, time of the level]      a bucket takes two

Time is an argument (seconds of a monotonic clock that all processes have in common).
"""

from __future__ import annotations

from typing import Protocol


class Cells(Protocol):
    """A list of floats, or a memory that several processes see. Fresh ones are 0."""

    def __getitem__(self, index: int, /) -> float:
        """The number in a cell."""

    def __setitem__(self, index: int, value: float, /) -> None:
        """Change it."""


class TokenBucket:
    """Holds at most one minute's worth, is full at first, and fills evenly.

    What is taken may be put right later (`correct`), so that the level may go below zero.
    """

    __slots__ = ("_at", "_cells", "_level", "capacity", "per_s")

    def __init__(self, per_minute: float, cells: Cells, index: int) -> None:
        self.capacity = float(per_minute)
        self.per_s = per_minute / 60
        self._cells = cells
        self._level, self._at = index, index + 1

    def level(self, now: float) -> float:
        """What is in it. A fresh cell's time is 0: never used, hence full."""
        cells = self._cells
        since = cells[self._at]
        if not since:
            return self.capacity
        return min(self.capacity, cells[self._level] + max(0.0, now - since) * self.per_s)

    def wait_s(self, amount: float, now: float) -> float:
        """How long until `amount` is in it; 0: it is. What exceeds it waits until it is full."""
        missing = min(amount, self.capacity) - self.level(now)
        return max(0.0, missing / self.per_s)

    def full_in_s(self, now: float) -> float:
        """How long until it is full."""
        return self.wait_s(self.capacity, now)

    def take(self, amount: float, now: float) -> bool:
        """Take `amount` if it is in it, or if it is full and never holds as much."""
        cells, capacity = self._cells, self.capacity
        since = cells[self._at]
        level = capacity
        if since:
            level = cells[self._level]
            if now > since:
                level += (now - since) * self.per_s
                level = min(level, capacity)
        if level < amount and level < capacity:
            return False
        cells[self._level] = level - amount
        cells[self._at] = now or 1e-9
        return True

    def correct(self, amount: float, now: float) -> None:
        """Take `amount`; give it back if it is negative. What fills it until `now` comes later."""
        cells = self._cells
        if not cells[self._at]:
            cells[self._level], cells[self._at] = self.capacity, now or 1e-9
        cells[self._level] -= amount
