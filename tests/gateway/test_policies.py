"""Who may be asked at all (context, capabilities), and who is by each policy and split."""

from __future__ import annotations

import pytest

from gateway.endpoints import EndpointTable, ServedModel
from gateway.routing import Router
from placement.routing_policy import RoutingPolicy
from tests.gateway.engines import an_endpoint
from tests.gateway.routers import a_call, a_router, some_endpoints, url_of

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
