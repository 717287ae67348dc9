from __future__ import annotations

import pytest

from tests.gateway.routing_simulation import Outcome, simulate


def outcomes(policy: str, **settings: object) -> list[Outcome]:
    return [simulate(policy, seed=seed, **settings) for seed in (1, 2, 3)]


def mean_hit_rate(found: list[Outcome]) -> float:
    return sum(each.hit_rate for each in found) / len(found)


def test_auto_finds_prompts_in_caches_far_more_often_and_still_spreads_the_work() -> None:
    auto, drawn, turns = (outcomes(policy) for policy in ("auto", "random", "round_robin"))

    best_of_others = max(mean_hit_rate(drawn), mean_hit_rate(turns))
    assert mean_hit_rate(auto) > best_of_others + 0.13
    assert max(each.imbalance for each in auto) < 1.1
    assert sum(each.mean_s for each in auto) < sum(each.mean_s for each in turns)


@pytest.mark.parametrize("policy", ["prefix", "session"])
def test_affinity_policies_trade_balance_for_hits_within_their_bound(policy: str) -> None:
    found = outcomes(policy, with_session=policy == "session")

    assert mean_hit_rate(found) > 0.7
    assert max(each.imbalance for each in found) < 1.4


def test_gateways_that_share_nothing_still_find_conversations_again() -> None:
    apart = outcomes("auto", gateways=4)
    with_session = outcomes("auto", gateways=4, with_session=True)
    drawn = outcomes("random", gateways=4)

    assert mean_hit_rate(apart) > mean_hit_rate(drawn) + 0.04
    assert mean_hit_rate(with_session) > mean_hit_rate(drawn) + 0.2
    assert max(each.imbalance for each in (*apart, *with_session)) < 1.3


@pytest.mark.parametrize(
    "planned", [(1000.0, 3000.0), (None, None)], ids=["as planned", "found out"]
)
def test_a_replica_of_three_times_the_speed_gets_about_three_times_the_work(
    planned: tuple[float | None, ...],
) -> None:
    for found in outcomes("auto", speeds=(1.0, 3.0), planned=planned):
        slow, fast = found.shares

        assert 2.3 < fast / slow < 4.2


def test_an_engine_that_is_slower_than_planned_gets_less_work() -> None:
    for found in outcomes("auto", speeds=(1.0, 1.0, 1.0, 0.3), planned=(1000.0,) * 4):
        assert found.shares[3] < 0.6 * max(found.shares)


def test_every_request_comes_to_its_end() -> None:
    for policy in ("auto", "least_load"):
        found = simulate(policy, count=50)
        assert found.requests == simulate("random", count=50).requests
