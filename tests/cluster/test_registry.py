"""From heartbeats to the endpoint table."""

from __future__ import annotations

import pytest

from cluster.registry import Registry
from cluster.shape_version import shape_version
from placement.fleet import ReplicaBounds
from placement.routing_policy import RoutingPolicy
from tests.builders import a_report, a_shape, a_variant


def test_ready_and_draining_replicas_are_endpoints():
    registry = Registry()
    for number, state in enumerate(("starting", "ready", "unhealthy", "draining", "failed")):
        registry.report(a_report(replica=f"r{number}", state=state), now_s=0)

    table = registry.table([a_variant()], version=7)

    assert [(each.id, each.state) for each in table.endpoints] == [
        ("r1", "ready"),
        ("r3", "draining"),
    ]
    assert table.version == 7


def test_an_endpoint_carries_what_the_gateway_needs():
    registry = Registry()
    registry.report(a_report(), now_s=0)

    [endpoint] = registry.table([a_variant(shape=a_shape(max_num_seqs=8))], version=1).endpoints

    assert endpoint.url == "http://127.0.0.1:4000"
    assert endpoint.api_key == "secret"
    assert endpoint.max_in_flight == 16
    assert endpoint.max_model_len == 4096


def test_endpoints_of_which_nothing_is_new_are_not_made_anew():
    registry, variants = Registry(), [a_variant()]
    for number in range(3):
        registry.report(a_report(replica=f"r{number}"), now_s=0)
    before = registry.table(variants, version=1).endpoints

    registry.report(a_report(replica="r0", running=5, number=1), now_s=1)
    registry.report(a_report(replica="r1", state="draining", number=1), now_s=1)
    registry.report(a_report(replica="r2", adapters={"a": "b"}, number=1), now_s=1)
    after = registry.table(variants, version=2).endpoints
    other = registry.table([a_variant(shape=a_shape(max_num_seqs=7))], version=3).endpoints

    assert [old is new for old, new in zip(before, after, strict=True)] == [True, False, False]
    assert (after[1].state, after[2].adapters) == ("draining", {"a": "b"})
    assert {endpoint.max_in_flight for endpoint in other} == {14}


def test_an_endpoint_says_which_engine_it_is_and_how_fast_it_should_be():
    registry = Registry()
    registry.report(a_report(), now_s=0)
    variant = a_variant()

    [endpoint] = registry.table([variant], version=1).endpoints

    assert endpoint.engine == variant.shape.engine
    assert endpoint.tokens_per_s == variant.shape.prediction.output_tokens_per_s


def test_how_requests_are_spread_and_what_they_fall_back_to_goes_to_gateways():
    policy = RoutingPolicy(policy="session", weights={"chat@local-sim": 1})
    variant = a_variant(routing=policy, fallback=("small",))

    [model] = Registry().table([variant], version=1).models

    assert (model.routing, model.fallback) == (policy, ("small",))


def test_a_model_without_replicas_stays_in_the_table():
    table = Registry().table([a_variant(aliases=("c",))], version=1)

    assert [(model.name, model.aliases) for model in table.models] == [("chat", ("c",))]
    assert table.endpoints == ()


def test_only_models_that_may_scale_to_zero_are_worth_holding_requests_for():
    sleeper = a_variant(model="sleeper", bounds=ReplicaBounds(min=0, max=1))

    models = Registry().table([a_variant(), sleeper], version=1).models

    assert [model.scalable for model in models] == [False, True]


def test_a_model_in_several_variants_promises_what_all_of_them_keep():
    long = a_variant(bounds=ReplicaBounds(min=1, max=2), shape=a_shape(max_model_len=32768))
    short = a_variant(
        variant="chat@other", bounds=ReplicaBounds(min=0, max=2), shape=a_shape(max_model_len=8192)
    )

    [model] = Registry().table([long, short], version=1).models

    assert model.max_model_len == 8192
    assert not model.scalable


def test_a_silent_replica_is_forgotten_and_named():
    registry = Registry(timeout_s=10)
    registry.report(a_report(replica="old"), now_s=0)
    registry.report(a_report(replica="new"), now_s=8)

    lost = registry.expire(now_s=11)

    assert [report.replica for report in lost] == ["old"]
    assert [report.replica for report in registry.of("chat@local-sim")] == ["new"]


def test_a_heartbeat_is_news_only_when_the_state_changes():
    registry = Registry()

    assert registry.report(a_report(state="starting"), now_s=0)
    assert not registry.report(a_report(state="starting", stage="loading"), now_s=1)
    assert registry.report(a_report(state="ready"), now_s=2)


def test_a_report_that_a_later_one_overtook_changes_nothing_but_shows_life():
    registry = Registry(timeout_s=10.0)
    registry.report(a_report(replica="r", state="ready", started_s=5.0, number=2), 0.0)

    news = registry.report(a_report(replica="r", state="starting", started_s=5.0, number=1), 9.0)

    assert not news
    assert [report.state for report in registry.reports] == ["ready"]
    assert registry.expire(15.0) == []


def test_a_replica_that_started_anew_counts_its_reports_anew():
    registry = Registry()
    registry.report(a_report(replica="r", state="ready", started_s=5.0, number=9), 0.0)

    assert registry.report(a_report(replica="r", state="starting", started_s=7.0, number=1), 1.0)
    assert [report.state for report in registry.reports] == ["starting"]


def test_a_stopped_replica_leaves_at_once():
    registry = Registry()
    registry.report(a_report(state="draining"), now_s=0)

    assert registry.report(a_report(state="stopped"), now_s=1)
    assert registry.of("chat@local-sim") == []


def test_replicas_of_an_older_shape_serve_but_are_not_counted():
    registry = Registry()
    registry.report(a_report(), now_s=0)
    changed = a_variant(shape=a_shape(max_model_len=8192))

    assert registry.ready(a_variant()) == 1
    assert registry.ready(changed) == 0
    assert len(registry.table([changed], version=1).endpoints) == 1


@pytest.mark.parametrize(
    "change", [{"aliases": ("c",)}, {"bounds": ReplicaBounds(min=0, max=9)}, {"replicas": 3}]
)
def test_what_an_engine_does_not_depend_on_needs_no_new_one(change):
    assert shape_version(a_variant(**change)) == shape_version(a_variant())


@pytest.mark.parametrize("change", [{"checkpoint": "other"}, {"pool": "other"}])
def test_what_an_engine_depends_on_needs_a_new_one(change):
    assert shape_version(a_variant(**change)) != shape_version(a_variant())


def test_a_retired_replica_drains_whatever_it_still_says():
    registry = Registry()
    registry.report(a_report(), now_s=0)

    registry.retire("r1")
    assert not registry.report(a_report(), now_s=1)

    [endpoint] = registry.table([a_variant()], version=1).endpoints
    assert endpoint.state == "draining"
    assert registry.ready(a_variant()) == 0


def test_who_reported_before_serve_was_asked_and_is_unknown_to_it_is_lost():
    registry = Registry()
    registry.report(a_report(replica="dead"), now_s=0)
    registry.report(a_report(replica="lives"), now_s=0)
    registry.report(a_report(replica="new"), now_s=5)

    lost = registry.lost({"lives"}, begun_s=4)

    assert [report.replica for report in lost] == ["dead"]
    assert {report.replica for report in registry.reports} == {"lives", "new"}


def test_a_lost_replica_that_goes_on_reporting_stays_out_until_serve_knows_it_again():
    registry = Registry(timeout_s=10.0)
    registry.report(a_report(replica="cut off"), now_s=0)
    registry.lost(set(), begun_s=4)

    assert not registry.report(a_report(replica="cut off"), now_s=5)
    assert registry.get("cut off") is None
    registry.lost(set(), begun_s=6)
    assert not registry.report(a_report(replica="cut off"), now_s=7)

    registry.lost({"cut off"}, begun_s=8)
    assert registry.report(a_report(replica="cut off"), now_s=9)


def test_a_lost_replica_is_remembered_only_while_it_reports():
    registry = Registry(timeout_s=10.0)
    registry.report(a_report(replica="r"), now_s=0)
    registry.lost(set(), begun_s=1)
    registry.report(a_report(replica="r"), now_s=5)

    registry.expire(now_s=14)
    assert not registry.report(a_report(replica="r"), now_s=14)
    registry.expire(now_s=25)

    assert registry.report(a_report(replica="r"), now_s=25)


def test_a_shape_that_is_being_replaced_serves_with_its_own_limits():
    registry = Registry()
    old = a_variant()
    new = a_variant(shape=a_shape(max_model_len=8192))
    registry.report(a_report(replica="old", version=shape_version(old)), now_s=0)
    registry.report(a_report(replica="new", version=shape_version(new), started_s=200), now_s=0)

    table = registry.table([new], version=1, outgoing=[old])

    assert [(each.id, each.max_model_len) for each in table.endpoints] == [
        ("old", 4096),
        ("new", 8192),
    ]


def test_another_variant_that_is_being_replaced_serves_beside_the_new_one():
    registry = Registry()
    registry.report(a_report(variant="chat@a100", replica="old"), now_s=0)
    registry.report(a_report(replica="new"), now_s=0)

    table = registry.table([a_variant()], 1, outgoing=[a_variant(variant="chat@a100")])

    assert {each.id for each in table.endpoints} == {"old", "new"}
    assert len(table.models) == 1
