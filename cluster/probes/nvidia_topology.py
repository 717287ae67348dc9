"""From the matrices of `nvidia-smi topo` to pairs of GPUs. Text in, values out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations

from placement.node_facts import PairFacts

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # the header is underlined
_GPU = re.compile(r"GPU(\d+)")


def parse_pairs(paths: str, peers: str) -> tuple[PairFacts, ...]:
    """Every pair of GPUs out of `nvidia-smi topo -m` and `nvidia-smi topo -p2p r`.

    A pair whose directions differ gets the entry that is not OK.
    """
    path, peer = _matrix(paths), _matrix(peers)
    gpus = sorted({gpu for pair in (*path, *peer) for gpu in pair})
    return tuple(
        PairFacts(
            first=first,
            second=second,
            path=path.get((first, second), ""),
            peer=_worse(peer.get((first, second), ""), peer.get((second, first), "")),
        )
        for first, second in combinations(gpus, 2)
    )


def _worse(one: str, other: str) -> str:
    return other if one == "OK" else one or other


def _matrix(text: str) -> Mapping[tuple[int, int], str]:
    """Entries by row and column; lines before the header and the legend after it are passed over."""
    columns: list[int] = []
    entries: dict[tuple[int, int], str] = {}
    for line in _ESCAPES.sub("", text).splitlines():
        words = line.split()
        if not columns:
            columns = [int(match[1]) for word in words if (match := _GPU.fullmatch(word))]
        elif words and (match := _GPU.fullmatch(words[0])):
            row = int(match[1])
            entries |= {
                (row, column): word for column, word in zip(columns, words[1:], strict=False)
            }
    return entries
