"""Helix's clusters with LLaMA: what placements of its layers over unequal nodes carry, side by side.

    python -m loadtests.bench_helix

All are judged by the same maximum flow over layers (`layer_flow`), in which Helix's own placements
carry to the digit what its solver reported. `helix_clusters` says where rates and placements come from.
"""

from __future__ import annotations

import itertools
import sys
import time

from loadtests.helix_clusters import CLUSTERS, Cluster, Kind, Span
from loadtests.layer_flow import flow
from loadtests.layer_stages import planned


def main() -> int:
    """Print what each placement carries; 1 where ours carries less than Helix's."""
    behind = [cluster for cluster in CLUSTERS if not _compare(cluster)]
    return 1 if behind else 0


def _compare(cluster: Cluster) -> bool:
    """Whether ours carries at least what Helix's does."""
    _say(f"{cluster.model}, {cluster.name}: {_in_words(cluster)}")
    theirs = flow(cluster, cluster.published)
    _line("Helix (published)", theirs, cluster.searched)
    _line("Swarm's rule", flow(cluster, equal_stages(cluster)))
    alone = own_pipelines(cluster)
    told = ", ".join(pipeline[0].kind.gpu for pipeline in alone) or "no type holds all layers"
    _line("a pipeline a type", sum(flow(cluster, pipeline) for pipeline in alone), told)
    started = time.perf_counter()
    spans = planned(cluster)
    seconds = time.perf_counter() - started
    ours = flow(cluster, spans)
    _line("bora", ours, f"{ours / theirs:.2f} x Helix, in {seconds:.1f} s")
    return ours >= theirs * (1 - 1e-9)


def equal_stages(cluster: Cluster) -> list[Span]:
    """Swarm's rule: stages as long as the smallest node holds; each node joins the weakest."""
    length = min(len(cluster.rates_of(kind)) for kind in cluster.nodes)
    carried = [0.0] * -(-cluster.layers // length)
    spans = []
    for kind, count in cluster.nodes.items():
        for _ in range(count):
            weakest = carried.index(min(carried))
            first, end = weakest * length, min((weakest + 1) * length, cluster.layers)
            carried[weakest] += cluster.rates_of(kind)[end - first - 1]
            spans.append(Span(kind, first, end))
    return spans


def own_pipelines(cluster: Cluster) -> list[list[Span]]:
    """One pipeline of each type, its layers shared out evenly; none where they do not fit."""
    pipelines = []
    for gpu in dict.fromkeys(kind.gpu for kind in cluster.nodes):
        nodes = [
            kind for kind, count in cluster.nodes.items() if kind.gpu == gpu for _ in range(count)
        ]
        if len(nodes) * len(cluster.rates[gpu]) >= cluster.layers:
            pipelines.append(_in_a_row(nodes, cluster.layers))
    return pipelines


def _in_a_row(nodes: list[Kind], layers: int) -> list[Span]:
    cuts = [layers * index // len(nodes) for index in range(len(nodes) + 1)]
    return [Span(kind, *cut) for kind, cut in zip(nodes, itertools.pairwise(cuts), strict=True)]


def _in_words(cluster: Cluster) -> str:
    count: dict[str, int] = {}
    for kind, nodes in cluster.nodes.items():
        count[kind.gpu] = count.get(kind.gpu, 0) + nodes
    return ", ".join(f"{nodes} x {gpu}" for gpu, nodes in count.items())


def _line(who: str, carried: float, note: str = "") -> None:
    _say(f"  {who:<20}{carried:9.1f} tokens/s  {note}".rstrip())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
