"""HashRing: consistent hashing, so that gateways which share nothing send the same key to the same place.

Each name has points on a circle, in proportion to its weight; a key belongs to the next point. When
a name comes or goes only the keys next to its points move.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from zlib import crc32

_POINTS = 64  # of a name of mean weight: shares within about 12 %
_MASK = 2**32 - 1
_MIX = 0x9E3779B1
_FEW = 16  # as long as less than 1/16 of the points change, one by one is faster than all anew


def spread(number: int) -> int:
    """A 32-bit number whose every bit depends on every bit of `number`; CRCs alone are linear."""
    number = (number ^ (number >> 16)) * _MIX & _MASK
    number = (number ^ (number >> 13)) * 0x85EBCA6B & _MASK
    return number ^ (number >> 16)


class HashRing:
    """Of names with weights. What is on it depends on these alone, not on what was there before."""

    __slots__ = ("_counts", "_names", "_points")

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._counts: dict[str, int] = {}
        self._points: list[int] = []
        self._names: list[str] = []
        self.weigh(weights or {})

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Be the ring of these. Costs little when few of them come, go or change."""
        counts, before = _counts(weights), self._counts
        changes = {
            name: (before.get(name, 0), counts.get(name, 0))
            for name in before.keys() | counts.keys()
            if before.get(name) != counts.get(name)
        }
        self._counts = counts
        if sum(abs(new - old) for old, new in changes.values()) * _FEW > len(self._points):
            placed = sorted(
                (point, name) for name, count in counts.items() for point in _points(name, 0, count)
            )
            self._points = [point for point, _ in placed]
            self._names = [name for _, name in placed]
            return
        for name, (old, new) in changes.items():
            for point in _points(name, new, old):
                at = self._place(point, name)
                del self._points[at], self._names[at]
            for point in _points(name, old, new):
                at = self._place(point, name)
                self._points.insert(at, point)
                self._names.insert(at, name)

    def _place(self, point: int, name: str) -> int:
        """Where it stands, or would: by points, and where these are the same by names."""
        points, names = self._points, self._names
        at = bisect_left(points, point)
        while at < len(points) and points[at] == point and names[at] < name:
            at += 1
        return at

    def home(self, key: int) -> str | None:
        """Where `key` belongs; None: the ring is empty."""
        names = self._names
        if not names:
            return None
        at = bisect_right(self._points, spread(key))
        return names[at if at < len(names) else 0]

    def walk(self, key: int) -> Iterator[str]:
        """Its home, then where it goes when that is overloaded, and so on; each name once."""
        names, seen = self._names, set()
        start = bisect_right(self._points, spread(key))
        for step in range(len(names)):
            name = names[(start + step) % len(names)]
            if name not in seen:
                seen.add(name)
                yield name


def _counts(weights: Mapping[str, float]) -> dict[str, int]:
    """How many points each has."""
    mean = sum(weights.values()) / max(len(weights), 1)
    return {
        name: max(1, round(_POINTS * weight / mean)) if mean else 1
        for name, weight in weights.items()
    }


def _points(name: str, first: int, end: int) -> Iterator[int]:
    """Those with the numbers from `first` to before `end`."""
    beginning = crc32(f"{name}#".encode())
    for number in range(first, end):
        yield spread(crc32(b"%d" % number, beginning))
