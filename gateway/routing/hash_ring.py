"""HashRing: consistent hashing, so that gateways which share nothing send the same key to the same place.

Each name has points on a circle, in proportion to its weight; a key belongs to the next point. When
a name comes or goes only the keys next to its points move.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from zlib import crc32

_POINTS = 64  # of a name of mean weight: shares within about 12 %
_MASK = 2**32 - 1
_MIX = 0x9E3779B1


def spread(number: int) -> int:
    """A 32-bit number whose every bit depends on every bit of `number`; CRCs alone are linear."""
    number = (number ^ (number >> 16)) * _MIX & _MASK
    number = (number ^ (number >> 13)) * 0x85EBCA6B & _MASK
    return number ^ (number >> 16)


class HashRing:
    """Of names with weights."""

    __slots__ = ("_names", "_points")

    def __init__(self, weights: Mapping[str, float]) -> None:
        mean = sum(weights.values()) / max(len(weights), 1)
        placed = sorted(
            (spread(crc32(f"{name}#{number}".encode())), name)
            for name, weight in weights.items()
            for number in range(max(1, round(_POINTS * weight / mean)) if mean else 1)
        )
        self._points = [point for point, _ in placed]
        self._names = [name for _, name in placed]

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
