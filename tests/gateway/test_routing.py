from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.call import Call, make_call
from gateway.endpoints import Endpoint, EndpointTable, ServedModel
from gateway.record import Record
from gateway.routing import EndpointState, Fault, Lease, Router
from gateway.usage import Usage
from placement.routing_policy import RoutingPolicy
from tests.gateway.engines import CHAT, a_chat, a_table, an_endpoint


def a_router(*endpoints: Endpoint, seed: int = 0, **model: object) -> Router:
    router = Router(seed=seed)
    served = ServedModel(**{"name": "chat", **model})
    router.apply(a_table(*endpoints, models=(served,)))
    return router


def a_call(
    text: str = "hi", *, session: str | None = None, path: str = CHAT, **body: object
) -> Call:
    asked = a_chat(messages=[{"role": "user", "content": text}], **body)
    headers = {"x-session-id": session} if session else {}
    return make_call("http", path, json.dumps(asked).encode(), headers, "id")


def some_endpoints(count: int, **changes: object) -> list[Endpoint]:
    return [an_endpoint(f"http://{n}", **changes) for n in range(count)]


def url_of(lease: Lease) -> str:
    return lease.endpoint.url


def a_record(status: int = 200, *, out: int = 10) -> Record:
    record = Record(api="http", path=CHAT, request_id="id", status=status)
    record.usage = Usage(prompt_tokens=10, completion_tokens=out) if status == 200 else None
    return record


# The table


_TABLES = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.sampled_from("123"), st.sampled_from(["ready", "draining"])
        ),
        max_size=5,
    ),
    min_size=1,
    max_size=5,
)


@given(_TABLES)
def test_a_router_that_saw_other_tables_serves_by_the_last(
    tables: list[list[tuple[str, str, str]]],
) -> None:
    def endpoints(rows: list[tuple[str, str, str]]) -> list[Endpoint]:
        return [an_endpoint(f"http://{at}", model=name, state=state) for name, at, state in rows]

    router, anew = Router(), Router()
    for rows in tables:
        router.apply(a_table(*endpoints(rows)))
    anew.apply(a_table(*endpoints(tables[-1])))

    assert router.snapshot(0) == anew.snapshot(0)
    assert router.urls() == anew.urls()
    assert router.models == anew.models


def test_a_table_leaves_models_alone_of_which_it_tells_nothing_new() -> None:
    chat = some_endpoints(2)
    router = Router()
    router.apply(a_table(*chat, an_endpoint("http://x", model="code")))
    router.reserve("chat", now=0)
    [route] = [each for each in router._routes.values() if each.model.name == "chat"]
    assert route.is_clear

    router.apply(a_table(*chat, an_endpoint("http://y", model="code")))
    assert route.is_clear

    router.apply(a_table(*chat, an_endpoint("http://z")))
    assert not route.is_clear


# Load


@pytest.mark.parametrize("policy", ["auto", "least_load"])
def test_places_are_filled_evenly_whatever_their_number(policy: str) -> None:
    router = a_router(
        an_endpoint("http://small", max_in_flight=4),
        an_endpoint("http://large", max_in_flight=12),
        routing={"policy": policy},
    )

    urls = [url_of(router.reserve("chat", now=0)) for _ in range(8)]

    assert urls.count("http://small") == 2


def test_an_idle_model_uses_its_endpoints_in_turn() -> None:
    router = a_router(*some_endpoints(3))
    urls = []
    for _ in range(6):
        lease = router.reserve("chat", now=0, call=a_call())
        urls.append(url_of(lease))
        router.release(lease)

    assert [urls.count(f"http://{n}") for n in range(3)] == [2, 2, 2]


def test_a_replica_that_is_planned_to_be_three_times_as_fast_gets_three_times_the_work() -> None:
    router = a_router(
        an_endpoint("http://slow", tokens_per_s=500), an_endpoint("http://fast", tokens_per_s=1500)
    )

    urls = [url_of(router.reserve("chat", now=0, call=a_call())) for _ in range(80)]

    assert urls.count("http://fast") == pytest.approx(60, abs=1)


def test_work_counts_rather_than_requests() -> None:
    router = a_router(*some_endpoints(2))
    long = router.reserve("chat", now=0, call=a_call("word " * 5000))

    short = [router.reserve("chat", now=0, call=a_call(max_tokens=8)) for _ in range(10)]

    assert url_of(long) not in map(url_of, short)


def test_full_draining_and_tried_endpoints_are_left_out() -> None:
    router = a_router(
        an_endpoint("http://full", max_in_flight=1),
        an_endpoint("http://draining", state="draining"),
        an_endpoint("http://tried"),
    )
    while url_of(router.reserve("chat", now=0)) != "http://full":
        pass

    assert router.reserve("chat", now=0, tried={"http://tried"}) is None


def test_workers_share_the_places_of_an_endpoint() -> None:
    router = Router(workers=4)
    router.apply(a_table(an_endpoint("http://a", max_in_flight=6)))

    assert [bool(router.reserve("chat", now=0)) for _ in range(3)] == [True, True, False]


def test_of_very_many_endpoints_all_are_used() -> None:
    router = a_router(*some_endpoints(100))

    leases = [router.reserve("chat", now=0, call=a_call()) for _ in range(1000)]

    in_flight = [state.in_flight for state in {lease.state for lease in leases}]
    assert len(in_flight) == 100
    assert max(in_flight) <= 20


# Affinity


def a_long_text(seed: int, words: int = 800) -> str:
    random = Random(seed)
    return " ".join(str(random.randrange(10**6)) for _ in range(words))


@pytest.mark.parametrize("policy", ["auto", "prefix"])
def test_a_conversation_goes_on_where_its_beginning_is_cached(policy: str) -> None:
    router = a_router(*some_endpoints(5), routing={"policy": policy})
    for seed in range(10):
        text = a_long_text(seed)
        first = router.reserve("chat", now=0, call=a_call(text))
        router.release(first)

        again = router.reserve("chat", now=1, call=a_call(text + " and " + a_long_text(99, 200)))

        assert again.endpoint == first.endpoint
        router.release(again)


@pytest.mark.parametrize("policy", ["auto", "prefix"])
def test_one_hot_prompt_does_not_overload_one_endpoint(policy: str) -> None:
    router = a_router(*some_endpoints(8), routing={"policy": policy})
    system = a_long_text(1)

    leases = [router.reserve("chat", now=0, call=a_call(f"{system} {n}")) for n in range(160)]

    in_flight = [state.in_flight for state in {lease.state for lease in leases}]
    assert max(in_flight) <= 1.5 * 160 / 8


@pytest.mark.parametrize("policy", ["auto", "session"])
def test_gateways_that_share_nothing_agree_where_a_session_lives(policy: str) -> None:
    endpoints = some_endpoints(6)
    one = a_router(*endpoints, seed=1, routing={"policy": policy})
    other = a_router(*endpoints[::-1], seed=2, routing={"policy": policy})
    for n in range(30):
        call = a_call(session=f"s{n}")
        leases = [router.reserve("chat", now=0, call=call) for router in (one, other)]

        assert leases[0].endpoint == leases[1].endpoint
        one.release(leases[0])
        other.release(leases[1])


def test_gateways_that_share_nothing_agree_where_a_new_prompt_lives() -> None:
    endpoints = some_endpoints(6)
    agreed = 0
    one, other = a_router(*endpoints), a_router(*endpoints[::-1])
    for seed in range(40):
        call = a_call(a_long_text(seed))
        leases = [router.reserve("chat", now=0, call=call) for router in (one, other)]
        agreed += leases[0].endpoint == leases[1].endpoint
        one.release(leases[0])
        other.release(leases[1])

    assert agreed == 40


def test_a_session_moves_on_when_its_home_is_overloaded() -> None:
    router = a_router(*some_endpoints(4, max_in_flight=64))

    leases = [router.reserve("chat", now=0, call=a_call(session="hot")) for _ in range(100)]

    in_flight = sorted(state.in_flight for state in {lease.state for lease in leases})
    assert len(in_flight) == 4
    assert in_flight[-1] < 45


def test_an_engine_that_was_replaced_is_not_taken_to_hold_anything() -> None:
    router = a_router(an_endpoint("http://a", id="r"), an_endpoint("http://b", id="s"))
    lease = router.reserve("chat", now=0, call=a_call(a_long_text(1)))
    router.release(lease)
    before = len(router._routes["chat"].index)
    moved = lease.endpoint.model_copy(update={"url": "http://new"})
    other = next(s.endpoint for s in router._states.values() if s.endpoint != lease.endpoint)

    router.apply(a_table(moved, other))

    assert before > 0
    assert len(router._routes["chat"].index) == 0


def test_sessions_and_conversations_stay_together_among_very_many_endpoints() -> None:
    router = a_router(*some_endpoints(40))
    for n in range(20):
        text = a_long_text(n)
        calls = [
            (a_call(session=f"s{n}"), a_call(session=f"s{n}")),
            (a_call(text), a_call(text + "more")),
        ]
        for first, second in calls:
            one = router.reserve("chat", now=0, call=first)
            router.release(one)
            other = router.reserve("chat", now=0, call=second)
            router.release(other)
            assert one.endpoint == other.endpoint


# Fitting


def test_images_go_to_endpoints_that_can_see() -> None:
    image = [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
    call = a_call(image)
    router = a_router(
        an_endpoint("http://blind", capabilities=("chat",)),
        an_endpoint("http://seeing", capabilities=("chat", "vision")),
    )

    assert {url_of(router.reserve("chat", now=0, call=call)) for _ in range(5)} == {"http://seeing"}


def test_unknown_capabilities_are_no_reason_to_refuse() -> None:
    image = [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
    router = a_router(
        an_endpoint("http://unknown"), an_endpoint("http://blind", capabilities=("chat",))
    )
    blind = a_router(an_endpoint("http://blind", capabilities=("chat",)))

    assert url_of(router.reserve("chat", now=0, call=a_call(image))) == "http://unknown"
    assert url_of(blind.reserve("chat", now=0, call=a_call(image))) == "http://blind"


def test_long_prompts_go_where_they_fit_and_too_long_ones_to_the_largest() -> None:
    router = a_router(
        an_endpoint("http://small", max_model_len=1000),
        an_endpoint("http://large", max_model_len=4000),
    )
    long, too_long = a_call("word " * 1500), a_call("word " * 9000)

    for call in (long, too_long):
        urls = {url_of(router.reserve("chat", now=0, call=call)) for _ in range(4)}
        assert urls == {"http://large"}


# Policies


def test_round_robin_takes_turns() -> None:
    router = a_router(*some_endpoints(3), routing={"policy": "round_robin"})

    urls = [url_of(router.reserve("chat", now=0)) for _ in range(6)]

    assert urls[:3] == urls[3:]
    assert len(set(urls)) == 3


def test_random_is_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[str]:
        router = a_router(*some_endpoints(3), seed=seed, routing={"policy": "random"})
        return [url_of(router.reserve("chat", now=0)) for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_weights_are_exact_in_the_long_run() -> None:
    weights = {"stable": 95, "canary": 4, "next": 1}
    endpoints = [an_endpoint(f"http://{v}", variant=v, max_in_flight=1000) for v in weights]
    router = a_router(*endpoints, routing={"weights": weights})

    variants = [router.reserve("chat", now=0).endpoint.variant for _ in range(500)]

    assert {v: variants.count(v) for v in weights} == {"stable": 475, "canary": 20, "next": 5}


def test_sessions_stay_with_their_variant() -> None:
    weights = {"stable": 3, "canary": 1}
    endpoints = [an_endpoint(f"http://{v}", variant=v, max_in_flight=4000) for v in weights]
    router = a_router(*endpoints, routing={"weights": weights})

    def variant_of(n: int) -> str:
        return router.reserve("chat", now=0, call=a_call(session=f"s{n}")).endpoint.variant

    first = [variant_of(n) for n in range(400)]

    assert [variant_of(n) for n in range(400)] == first
    assert first.count("canary") == pytest.approx(100, abs=30)


def test_variants_that_are_not_weighted_get_requests_only_in_need() -> None:
    endpoints = [an_endpoint(f"http://{v}", variant=v) for v in ("a", "b")]
    router = a_router(*endpoints, routing={"weights": {"a": 1}})

    assert {url_of(router.reserve("chat", now=0)) for _ in range(9)} == {"http://a"}
    assert url_of(router.reserve("chat", now=0, tried={"http://a"})) == "http://b"


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="all 0"):
        RoutingPolicy(weights={"a": 0})


def test_fallbacks_are_the_models_own_list_without_itself_and_what_is_unknown() -> None:
    router = Router()
    router.apply(
        EndpointTable(
            models=(
                ServedModel(name="a", fallback=("b", "a", "gone", "cc", "b")),
                ServedModel(name="b", fallback=("d",)),
                ServedModel(name="c", aliases=("cc",)),
            )
        )
    )

    assert router.fallbacks("a") == ("b", "c")
    assert router.fallbacks("c") == ()
    assert router.fallbacks("gone") == ()


# The table


def test_a_name_wins_over_another_models_alias() -> None:
    router = Router()
    router.apply(
        EndpointTable(models=(ServedModel(name="a", aliases=("b", "c")), ServedModel(name="b")))
    )

    assert router.resolve("b").name == "b"
    assert router.resolve("c").name == "a"
    assert router.resolve("d") is None


def test_an_endpoint_whose_model_is_not_listed_is_served_all_the_same() -> None:
    router = Router()
    router.apply(EndpointTable(endpoints=(an_endpoint("http://a"),)))

    assert router.resolve("chat").name == "chat"


def test_a_lease_is_released_once() -> None:
    router = Router()
    router.apply(a_table(an_endpoint("http://a")))
    lease = router.reserve("chat", now=0)

    assert [router.release(lease), router.release(lease)] == [True, False]
    assert lease.state.in_flight == 0


# Failures


def test_an_endpoint_that_broke_off_is_the_last_choice_until_its_time_is_over() -> None:
    router = a_router(*some_endpoints(2, max_in_flight=2))
    bad = router.reserve("chat", now=0)
    router.failed(bad, Fault.BROKE, now=0)
    router.release(bad)

    others = [router.reserve("chat", now=1), router.reserve("chat", now=1)]

    assert bad.endpoint not in [lease.endpoint for lease in others]
    assert router.reserve("chat", now=1) is None  # waiting for the healthy one is better
    assert router.reserve("chat", now=2).endpoint == bad.endpoint


def test_where_nobody_listens_no_request_goes_until_one_tries_again() -> None:
    router = a_router(*some_endpoints(2))
    bad = router.reserve("chat", now=0)
    router.failed(bad, Fault.UNREACHABLE, now=0)
    router.release(bad)

    assert {router.reserve("chat", now=1).endpoint == bad.endpoint for _ in range(9)} == {False}
    after = [router.reserve("chat", now=3) for _ in range(9)]
    assert [lease.endpoint for lease in after].count(bad.endpoint) == 1
    probe = next(lease for lease in after if lease.endpoint == bad.endpoint)
    router.release(probe, now=4, record=a_record())
    more = [router.reserve("chat", now=4) for _ in range(9)]
    assert [lease.endpoint for lease in more].count(bad.endpoint) > 1


def test_when_every_endpoint_has_failed_requests_still_try_the_one_whose_time_ends_first() -> None:
    router = a_router(*some_endpoints(3))
    failed = []
    for now in (0.0, 0.1, 0.2):
        lease = router.reserve("chat", now=now)
        router.failed(lease, Fault.UNREACHABLE, now=now)
        router.release(lease)
        failed.append(lease.endpoint)

    assert len(set(map(str, failed))) == 3
    assert router.reserve("chat", now=0.3).endpoint == failed[0]


def test_an_endpoint_that_pushes_back_gets_less_but_has_not_failed() -> None:
    router = a_router(*some_endpoints(2))
    busy = router.reserve("chat", now=0)
    for _ in range(10):
        router.failed(busy, Fault.BUSY, now=0)
    router.release(busy)

    soon = [router.reserve("chat", now=0.5).endpoint for _ in range(10)]

    assert 0 < soon.count(busy.endpoint) < 4
    assert busy.state.breaker.closed


def test_errors_of_clients_open_no_breaker() -> None:
    router = a_router(*some_endpoints(1))
    for _ in range(100):
        lease = router.reserve("chat", now=0)
        router.release(lease, now=0, record=a_record(400))

    assert lease.state.breaker.closed


def test_an_endpoint_that_moved_is_no_longer_suspect() -> None:
    router = Router()
    router.apply(a_table(an_endpoint("http://a", id="r"), an_endpoint("http://b", id="s")))
    lease = router.reserve("chat", now=0)
    router.failed(lease, Fault.UNREACHABLE, now=0)
    router.release(lease)
    moved = lease.endpoint.model_copy(update={"url": "http://new"})

    router.apply(a_table(moved))

    assert router.reserve("chat", now=1).state.breaker.closed


def test_a_dead_endpoint_gets_nothing_until_a_check_passes() -> None:
    router = a_router(*some_endpoints(2))
    for now in range(3):
        died = router.check_failed("http://0", now=now, enough=3)

    assert [state.endpoint.url for state in died] == ["http://0"]
    assert router.num_ready("chat") == 1
    assert {url_of(router.reserve("chat", now=4)) for _ in range(5)} == {"http://1"}
    assert router.check_failed("http://0", now=5, enough=3) == []  # told once
    assert [s.endpoint.url for s in router.check_passed("http://0", now=6)] == ["http://0"]
    assert "http://0" in {url_of(router.reserve("chat", now=7)) for _ in range(9)}


def test_after_one_failed_check_requests_go_elsewhere_for_a_while() -> None:
    router = a_router(*some_endpoints(2))
    router.check_failed("http://0", now=0, enough=4)

    assert {url_of(router.reserve("chat", now=1)) for _ in range(5)} == {"http://1"}
    assert router.num_ready("chat") == 2  # it is not dead
    assert "http://0" in {url_of(router.reserve("chat", now=5)) for _ in range(9)}


def test_when_every_check_fails_the_load_still_goes_everywhere() -> None:
    router = a_router(*some_endpoints(2))
    for now in range(3):
        for url in ("http://0", "http://1"):
            router.check_failed(url, now=now, enough=9)

    used = {url_of(router.reserve("chat", now=3.6)) for _ in range(9)}
    assert used == {"http://0", "http://1"}


def test_where_nobody_replaces_the_dead_they_are_asked_all_the_same() -> None:
    alone, managed = a_router(*some_endpoints(2)), a_router(*some_endpoints(2), managed=True)
    for router in (alone, managed):
        for url in ("http://0", "http://1"):
            router.check_failed(url, now=0, enough=1)
        assert router.num_ready("chat") == 0

    assert managed.reserve("chat", now=1) is None
    assert not managed.can_serve("chat")
    lease = alone.reserve("chat", now=1)
    # and given up with the next check that fails
    assert alone.check_failed(url_of(lease), now=2, enough=1) == [lease.state]


def test_a_passed_check_says_nothing_of_requests_that_break_off() -> None:
    router = a_router(*some_endpoints(1))
    lease = router.reserve("chat", now=0)
    for fault, open_after in ((Fault.BROKE, True), (Fault.UNREACHABLE, False)):
        for _ in range(3):
            router.failed(lease, fault, now=0)
        assert not lease.state.breaker.closed

        router.check_passed("http://0", now=0.5)

        assert lease.state.breaker.closed is not open_after
        lease.state.breaker.close()


def test_requests_that_succeed_keep_an_endpoint_alive_whose_checks_fail() -> None:
    router = a_router(*some_endpoints(1))
    for now in range(20):
        router.check_failed("http://0", now=now, enough=3)
        lease = router.reserve("chat", now=now)
        router.release(lease, now=now, record=a_record())

    assert router.num_ready("chat") == 1


def test_a_far_slower_endpoint_is_left_alone_for_a_while_then_tried_once() -> None:
    router = a_router(*some_endpoints(4), routing={"policy": "round_robin"})
    slow: EndpointState | None = None
    now = 0.0
    for _ in range(80):
        lease = router.reserve("chat", now=now)
        slow = slow or lease.state
        now += 0.1
        lease.since = now - (8.0 if lease.state is slow else 1.0)
        router.release(lease, now=now, record=a_record())
        if slow.breaker.is_slow:
            break

    assert slow.breaker.state(now) == "open"
    assert slow.ejections == 1
    during = [router.reserve("chat", now=now + 1) for _ in range(12)]
    assert slow not in [lease.state for lease in during]
    after = [router.reserve("chat", now=now + 11) for _ in range(12)]
    assert [lease.state for lease in after].count(slow) == 1


def test_an_endpoint_that_turns_out_slow_gets_less() -> None:
    router = a_router(*some_endpoints(2))
    slow = None
    now = 0.0
    for _ in range(60):
        lease = router.reserve("chat", now=now)
        slow = slow or lease.endpoint
        now += 0.1
        lease.since = now - (3.0 if lease.endpoint == slow else 1.0)
        router.release(lease, now=now, record=a_record())

    endpoints = [router.reserve("chat", now=now).endpoint for _ in range(100)]

    assert 20 <= endpoints.count(slow) <= 35


def test_a_snapshot_tells_of_every_endpoint() -> None:
    router = a_router(an_endpoint("http://a", variant="v", engine="vllm"), an_endpoint("http://b"))
    lease = router.reserve("chat", now=0, call=a_call(a_long_text(1)))
    router.failed(lease, Fault.UNREACHABLE, now=0)

    told = {each.url: each for each in router.snapshot(1.0)}

    mine = told[lease.endpoint.url]
    assert (mine.breaker, mine.in_flight, mine.state) == ("open", 1, "ready")
    assert mine.tokens_in_flight == lease.work > 0
    assert told["http://a"].engine == "vllm"
    assert sum(each.in_flight for each in told.values()) == 1


# Whatever happens


@dataclass
class History:
    """Any order of what can happen to a router."""

    router: Router = field(default_factory=Router)
    leases: list[Lease] = field(default_factory=list)
    now: float = 0.0


_endpoints = st.lists(
    st.builds(
        lambda n, model, places, state, variant: an_endpoint(
            f"http://{n}", model=model, max_in_flight=places, state=state, variant=variant
        ),
        st.integers(0, 4),
        st.sampled_from(["chat", "code"]),
        st.integers(1, 3),
        st.sampled_from(["ready", "ready", "draining"]),
        st.sampled_from(["v", "w"]),
    ),
    max_size=6,
)
_policies = st.builds(
    RoutingPolicy,
    policy=st.sampled_from(["auto", "least_load", "prefix", "session", "round_robin", "random"]),
    weights=st.sampled_from([{}, {"v": 1}, {"v": 1, "w": 2}]),
)
_calls = st.one_of(
    st.none(),
    st.builds(
        a_call,
        st.sampled_from(["hi", "long " * 300, "other " * 900]),
        session=st.sampled_from(["s", None]),
    ),
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.tuples(_endpoints, _policies)),
        st.tuples(st.just("reserve"), st.tuples(st.sampled_from(["chat", "code", "none"]), _calls)),
        st.tuples(
            st.just("release"),
            st.tuples(st.integers(0, 20), st.sampled_from([200, 400, 499, 502, None])),
        ),
        st.tuples(st.just("fail"), st.tuples(st.integers(0, 20), st.sampled_from(list(Fault)))),
        st.tuples(st.just("check"), st.tuples(st.integers(0, 4), st.booleans())),
    ),
    max_size=60,
)


def _play(history: History, step: tuple[str, tuple]) -> None:
    kind, (value, how) = step
    router, leases = history.router, history.leases
    history.now += 0.5
    now = history.now
    if kind == "apply":
        models = tuple(ServedModel(name=name, routing=how) for name in {e.model for e in value})
        router.apply(EndpointTable(version=1, models=models, endpoints=value))
    elif kind == "reserve":
        lease = router.reserve(value, now=now, call=how)
        if lease is None:
            return
        assert lease.endpoint.state == "ready"
        assert lease.endpoint.model == value
        assert lease.state.in_flight <= lease.endpoint.max_in_flight
        leases.append(lease)
    elif kind == "check":
        if how:
            router.check_passed(f"http://{value}", now=now)
        else:
            router.check_failed(f"http://{value}", now=now, enough=2)
    elif leases and kind == "fail":
        router.failed(leases[value % len(leases)], how, now=now)
    elif leases:
        lease = leases.pop(value % len(leases))
        router.release(lease, now=now, record=None if how is None else a_record(how))


@given(_steps)
def test_places_and_work_are_never_oversold_and_all_come_back(steps: list) -> None:
    history = History()
    seen: set[EndpointState] = set()
    for step in steps:
        _play(history, step)
        seen |= {lease.state for lease in history.leases}
        seen |= set(history.router._states.values())
        for state in seen:
            held = [lease for lease in history.leases if lease.state is state]
            assert state.in_flight == len(held)
            assert state.work == sum(lease.work for lease in held)
            assert sum(lease.is_probe for lease in held if state.breaker.probing) <= 1

    for lease in history.leases:
        history.router.release(lease)

    assert all(state.in_flight == 0 and state.work == 0 for state in seen)


@given(_endpoints, _policies)
def test_a_free_place_is_found_whenever_there_is_one(
    endpoints: list, policy: RoutingPolicy
) -> None:
    router = Router()
    models = (ServedModel(name="chat", routing=policy), ServedModel(name="code"))
    router.apply(EndpointTable(models=models, endpoints=tuple(endpoints)))
    unique = {(e.model, e.key): e for e in reversed(endpoints)}
    places = sum(
        e.max_in_flight for e in unique.values() if e.model == "chat" and e.state == "ready"
    )

    taken = 0
    while router.reserve("chat", now=0, call=a_call("long " * 300)):
        taken += 1

    assert taken == places
