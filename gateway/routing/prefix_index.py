"""PrefixIndex: which endpoints have lately seen which beginnings of prompts. Bounded memory.

Blocks are told by chained hashes, so that a block stands for all of the prompt up to its end.
Endpoints are bits of a mask. There are two generations: what was not used while the young one filled
up is forgotten, per endpoint, which is nearly the order in which engines evict.
"""

from __future__ import annotations

from collections.abc import Sequence


class PrefixIndex:
    """Of one model. Holds at most `max_blocks` blocks, about 120 bytes each."""

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, max_blocks: int = 65_536) -> None:
        self._half = max(1, max_blocks // 2)
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        """Blocks known, at most."""
        return len(self._young) + len(self._old)

    def holders(self, hashes: Sequence[int]) -> list[int]:
        """Masks of the endpoints that saw block 0, 0-1, 0-2, ..., until one that nobody saw."""
        found: list[int] = []
        young, old = self._young.get, self._old.get
        for block in hashes:
            mask = young(block, 0) | old(block, 0)
            if not mask:
                break
            found.append(mask)
        return found

    def add(self, hashes: Sequence[int], bit: int) -> None:
        """The endpoint `bit` sees these blocks now."""
        young = self._young
        for block in hashes:
            young[block] = young.get(block, 0) | bit
        if len(young) >= self._half:
            self._old, self._young = young, {}
            while len(self._old) > self._half:
                self._old.popitem()

    def forget(self, bits: int) -> None:
        """These endpoints have lost what they had seen."""
        for blocks in (self._young, self._old):
            for block, mask in list(blocks.items()):
                if mask & bits:
                    if left := mask & ~bits:
                        blocks[block] = left
                    else:
                        del blocks[block]
