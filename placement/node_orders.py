"""In which order the nodes of a pipeline may follow each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from placement.candidate import Device
from placement.inventory import Pool


@dataclass(frozen=True, slots=True)
class Nodes:
    """GPUs of one node of a pool."""

    pool: Pool
    device: Device
    gpus: int


def orders(nodes: Sequence[Nodes]) -> Iterator[tuple[Nodes, ...]]:
    """Orders of the stages' nodes: any kind may have the first of them, and any the last.

    Nodes that are alike stay together otherwise, and kinds between the ends stand by their network's
    speed, so that few sends wait for a slow network.
    """
    alike: dict[Device, list[Nodes]] = {}
    for each in nodes:
        alike.setdefault(each.device, []).append(each)
    blocks = list(alike.values())
    for first, last in itertools.product(range(len(blocks)), repeat=2):
        head, tail = blocks[first], blocks[last]
        if first == last:
            if len(blocks) > 1 and len(head) == 1:
                continue
            head, tail = head[:-1], head[-1:]
        between = [block for at, block in enumerate(blocks) if at not in (first, last)]
        falling = bool(head) and _network(head[0]) > _network(tail[0])
        between.sort(key=lambda block: _network(block[0]), reverse=falling)
        yield tuple(itertools.chain(head, *between, tail))


def _network(nodes: Nodes) -> float:
    return nodes.device.inter_node_bytes_per_s or 0.0
