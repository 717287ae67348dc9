"""What a placement of layers on nodes carries: a maximum flow from the first layer to the last.

The model of Helix (ASPLOS 2025): a token passes from a node to any other that holds the layer after
the former's last; a node carries so many tokens/s as its profile has for the layers that it holds,
a link between two nodes of different regions so many as its bandwidth allows. Inside a region links
of 10 Gb/s are far from full. Latency does not matter to a flow.
"""

from __future__ import annotations

from collections.abc import Sequence

from loadtests.helix_clusters import Cluster, Span
from placement.milp import Limits, Program

Terms = list[tuple[int, float]]


def flow(cluster: Cluster, spans: Sequence[Span]) -> float:
    """Tokens/s that nodes with these layers carry."""
    program = Program()
    enter: list[Terms] = [[] for _ in spans]
    leave: list[Terms] = [[] for _ in spans]
    for at, span in enumerate(spans):
        if span.first == 0:
            enter[at].append((program.column(-1.0, whole=False), 1.0))
        if span.end == cluster.layers:
            leave[at].append((program.column(whole=False), -1.0))
        for to, other in enumerate(spans):
            if to != at and other.first <= span.end < other.end:
                link = _link(program, cluster, span, other)
                leave[at].append((link, -1.0))
                enter[to].append((link, 1.0))
    for span, into, out in zip(spans, enter, leave, strict=True):
        program.row(into, upper=cluster.rates_of(span.kind)[span.end - span.first - 1])
        program.row([*into, *out], lower=0.0, upper=0.0)
    answer = program.solve(Limits())
    return 0.0 if answer is None else -answer.cost


def _link(program: Program, cluster: Cluster, one: Span, other: Span) -> int:
    if cluster.between_regions is None or one.kind.region == other.kind.region:
        return program.column(whole=False)
    return program.column(upper=cluster.between_regions, whole=False)
