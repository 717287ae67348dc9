"""The admission's own code under floods, in virtual time: no sockets, the same result every time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from gateway.admission import Admission
from gateway.call import Call
from gateway.config import Limits
from gateway.errors import Overloaded, Unavailable
from gateway.shares import WINDOW_S
from gateway.tenants import Tenant
from tests.gateway.engines import a_table, an_endpoint
from tests.gateway.virtual_time import run_in_virtual_time

WARM_S = 40.0  # after which queue times are looked at
END_S = 160.0
NO_TIME_S = 0.01  # below the time that anybody notices


@dataclass
class Load:
    """What one tenant sends. `rate` (per s) makes it open loop, `clients` closed loop."""

    tenant: Tenant
    rate: float = 0.0
    clients: int = 0
    service_s: Callable[[Random], float] = lambda random: random.expovariate(1)
    max_tokens: int = 100
    waited_s: list[float] = field(default_factory=list)
    served: int = 0
    refused: int = 0

    @property
    def p95_s(self) -> float:
        return sorted(self.waited_s)[int(0.95 * len(self.waited_s))]


def a_load(name: str, *, weight: float = 1.0, priority: int = 5, **changes: object) -> Load:
    tenant = Tenant(name=name, weight=weight, priority=priority)
    return Load(**{"tenant": tenant, **changes})


async def _one_request(admission: Admission, load: Load, random: Random) -> None:
    loop = asyncio.get_running_loop()
    body = b'{"max_tokens": %d}' % load.max_tokens
    tenant = load.tenant
    call = Call("http", "/v1/completions", "chat", body, "id", tenant=tenant)
    call.priority = tenant.priority
    service_s, came = load.service_s(random), loop.time()
    try:
        lease = admission.try_acquire("chat", call=call) or await admission.wait("chat", (), call)
    except (Overloaded, Unavailable):
        load.refused += 1
        return
    if came > WARM_S:
        load.waited_s.append(loop.time() - came)
        load.served += 1
    await asyncio.sleep(service_s)
    admission.release(lease)


async def _open_loop(admission: Admission, load: Load, random: Random) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        while loop.time() < END_S:
            await asyncio.sleep(random.expovariate(load.rate))
            tasks.create_task(_one_request(admission, load, Random(random.random())))


async def _closed_loop(admission: Admission, load: Load, random: Random) -> None:
    loop = asyncio.get_running_loop()
    while loop.time() < END_S:
        await asyncio.sleep(0.001)  # a network between two requests
        await _one_request(admission, load, random)


async def _play(loads: list[Load], places: int, limits: Limits) -> None:
    loop = asyncio.get_running_loop()
    admission = Admission(limits, clock=loop.time)
    endpoints = [an_endpoint(f"http://{n}", max_in_flight=places // 2) for n in range(2)]
    admission.apply(a_table(*endpoints))
    async with asyncio.TaskGroup() as tasks:
        for load in loads:  # each with random numbers of its own, the same in every company
            if load.rate:
                tasks.create_task(_open_loop(admission, load, Random(load.tenant.name)))
            for number in range(load.clients):
                random = Random(f"{load.tenant.name}-{number}")
                tasks.create_task(_closed_loop(admission, load, random))
    assert admission.queued("chat") == 0
    assert admission.router.places("chat")[0] == places


def play(*loads: Load, places: int = 20, **limits: float) -> None:
    run_in_virtual_time(_play(list(loads), places, Limits(**limits)))


def long_streams(random: Random) -> float:
    return random.uniform(20, 60)


SHAPES = {
    "open loop": ({"rate": 2.0}, {"rate": 100.0}),
    "closed loop": ({"clients": 3}, {"clients": 150}),
    "closed against open": ({"clients": 2}, {"rate": 100.0}),
    "the flood's streams are long": (
        {"rate": 4.0},
        {"rate": 10.0, "service_s": long_streams},
    ),
    "the flood's requests are cheap": (
        {"rate": 2.0, "max_tokens": 4000},
        {"rate": 100.0, "max_tokens": 1},
    ),
    "the light one has less weight": (
        {"rate": 1.0, "weight": 1.0},
        {"rate": 50.0, "weight": 2.0},
    ),
    "the light one has more weight": (
        {"rate": 3.0, "weight": 4.0},
        {"rate": 150.0, "weight": 1.0},
    ),
    "rare requests": ({"rate": 0.5}, {"rate": 25.0}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_flood_of_fifty_times_the_load_leaves_the_others_queue_time_alone(shape: str) -> None:
    light, flood = SHAPES[shape]
    alone, beside, rival = a_load("light", **light), a_load("light", **light), a_load("f", **flood)

    play(alone, queue_timeout_s=1e6)
    play(beside, rival, queue_timeout_s=20.0)

    assert len(beside.waited_s) > 40
    assert beside.refused == 0
    assert beside.p95_s <= 1.5 * alone.p95_s + NO_TIME_S
    assert rival.served > 0


def test_without_a_rival_a_tenant_may_have_everything() -> None:
    greedy = a_load("greedy", clients=60)

    play(greedy)

    assert greedy.served > 0.97 * 20 * (END_S - WARM_S)  # 20 places, 1 s each


def test_what_is_kept_for_a_light_tenant_is_only_what_it_needs() -> None:
    light, flood = a_load("light", rate=1.0), a_load("flood", clients=60)

    play(light, flood)

    assert light.p95_s <= NO_TIME_S
    assert flood.served > 14 * (END_S - WARM_S)  # of 20 places


def test_tenants_that_all_want_more_than_there_is_share_by_weight() -> None:
    loads = [a_load(f"w{weight}", clients=60, weight=weight) for weight in (1, 2, 5)]

    play(*loads)

    total = sum(load.served for load in loads)
    for load in loads:
        assert load.served / total == pytest.approx(load.tenant.weight / 8, rel=0.2)


def test_a_higher_priority_goes_first_and_the_lower_gets_what_is_left() -> None:
    high = a_load("high", clients=12, priority=9)
    low = a_load("low", clients=60, priority=1)

    play(high, low)

    assert high.p95_s < 0.5
    assert high.served > 0.8 * 12 * (END_S - WARM_S)
    assert low.served > 3 * (END_S - WARM_S)


def test_a_flood_that_fills_the_queue_is_refused_and_others_are_not() -> None:
    light, flood = a_load("light", clients=15), a_load("flood", rate=100.0)

    play(light, flood, max_queued=50)

    assert light.refused == 0
    assert flood.refused > 1000


def test_what_was_kept_for_a_tenant_that_left_is_free_again_soon() -> None:
    async def scenario() -> float:
        loop = asyncio.get_running_loop()
        admission = Admission(Limits(queue_timeout_s=100), clock=loop.time)
        admission.apply(a_table(an_endpoint("http://a", max_in_flight=2)))
        gone, stays = Tenant(name="gone"), Tenant(name="stays")
        calls = [Call("http", "/", "chat", b"{}", "id", tenant=each) for each in (gone, stays)]
        admission.release(admission.try_acquire("chat", call=calls[0]))
        assert admission.try_acquire("chat", call=calls[1]) is not None
        assert admission.try_acquire("chat", call=calls[1]) is None  # kept for the other
        await admission.wait("chat", (), calls[1])
        return loop.time()

    assert WINDOW_S <= run_in_virtual_time(scenario()) <= WINDOW_S + 3
