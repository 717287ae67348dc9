from __future__ import annotations

from collections import Counter

import pytest

from loadtests.bench_helix import equal_stages, own_pipelines
from loadtests.helix_clusters import CLUSTERS, Cluster, Kind, Span
from loadtests.layer_flow import flow
from loadtests.layer_stages import planned

FAST, SLOW = Kind("fast", 0), Kind("slow", 0)
AWAY = Kind("fast", 1)


def a_cluster(between_regions: float | None = None, **nodes: int) -> Cluster:
    kinds = {"fast": FAST, "slow": SLOW, "away": AWAY}
    return Cluster(
        name="test",
        model="test",
        layers=4,
        nodes={kinds[name]: count for name, count in nodes.items()},
        rates={"fast": (100.0, 50.0, 30.0, 20.0), "slow": (40.0, 16.0)},
        between_regions=between_regions,
        published=(),
    )


def test_a_chain_carries_what_its_slowest_node_does() -> None:
    chain = [Span(FAST, 0, 1), Span(FAST, 1, 4)]

    assert flow(a_cluster(fast=2), chain) == pytest.approx(30.0)


def test_tokens_may_enter_a_node_at_any_layer_that_it_holds() -> None:
    overlapping = [Span(FAST, 0, 2), Span(FAST, 1, 4)]

    assert flow(a_cluster(fast=2), overlapping) == pytest.approx(30.0)


def test_a_layer_that_nobody_holds_stops_everything() -> None:
    assert flow(a_cluster(fast=2), [Span(FAST, 0, 1), Span(FAST, 2, 4)]) == 0.0


def test_a_link_between_regions_limits_each_pair_of_nodes() -> None:
    cluster = a_cluster(between_regions=10.0, fast=1, away=2)

    assert flow(cluster, [Span(FAST, 0, 2), Span(AWAY, 2, 4)]) == pytest.approx(10.0)
    both = [Span(FAST, 0, 2), Span(AWAY, 2, 4), Span(AWAY, 2, 4)]
    assert flow(cluster, both) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("cluster", "told"),
    list(zip(CLUSTERS, (1657.20, 1289.56, 1657.20, 1212.18, 4137.55), strict=True)),
)
def test_published_placements_carry_what_helix_said(cluster: Cluster, told: float) -> None:
    assert flow(cluster, cluster.published) == pytest.approx(told, abs=0.02)
    assert Counter(span.kind for span in cluster.published) == cluster.nodes


def test_ours_uses_each_node_once_and_carries_at_least_as_much() -> None:
    cluster = CLUSTERS[1]

    ours = planned(cluster)

    for kind, nodes in Counter(span.kind for span in ours).items():
        assert nodes <= cluster.nodes[kind]
    assert flow(cluster, ours) >= flow(cluster, cluster.published)


def test_a_small_cluster_is_used_as_well_as_it_can_be() -> None:
    # Two fast nodes hold two layers each; the slow ones could only stand in their way.
    assert flow(a_cluster(fast=2, slow=1), planned(a_cluster(fast=2, slow=1))) == 50.0


def test_borders_between_regions_get_stages_with_a_branch_for_each_link() -> None:
    cluster = a_cluster(between_regions=20.0, fast=1, away=2)

    # Layers 0 and 1 here, 2 and 3 on both nodes there: two links of 20.
    assert flow(cluster, planned(cluster)) >= 40.0


def test_swarm_gives_each_node_to_the_weakest_stage() -> None:
    spans = equal_stages(a_cluster(fast=2, slow=2))

    assert spans == [Span(FAST, 0, 2), Span(FAST, 2, 4), Span(SLOW, 0, 2), Span(SLOW, 2, 4)]


def test_a_type_that_cannot_hold_all_layers_has_no_pipeline() -> None:
    pipelines = own_pipelines(a_cluster(fast=2, slow=1))

    assert pipelines == [[Span(FAST, 0, 2), Span(FAST, 2, 4)]]
