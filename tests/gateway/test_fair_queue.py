from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.fair_queue import FairQueue
from gateway.tenants import Tenant


@dataclass(frozen=True)
class Item:
    tenant: str
    number: int


def a_queue(max_length: int = 1000, max_size: int = 1000) -> FairQueue[Item]:
    return FairQueue(max_length, max_size)


def fill(
    queue: FairQueue[Item],
    name: str,
    count: int,
    *,
    weight: float = 1.0,
    priority: int = 5,
    cost: float = 1.0,
    size: int = 0,
    first: int = 0,
) -> list[Item]:
    tenant = Tenant(name=name, weight=weight)
    lost = []
    for number in range(first, first + count):
        lost += queue.push(Item(name, number), tenant, priority=priority, cost=cost, size=size)
    return lost


def take(queue: FairQueue[Item], count: int) -> list[Item]:
    return [item for _ in range(count) if (item := queue.pop(lambda _: True)) is not None]


def names(items: list[Item]) -> str:
    return "".join(item.tenant for item in items)


def test_tenants_take_turns_and_each_is_first_come_first_served() -> None:
    queue = a_queue()
    fill(queue, "a", 5)
    fill(queue, "b", 2)

    served = take(queue, 9)

    assert names(served[:4]) in {"abab", "baba"}
    assert [item.number for item in served if item.tenant == "a"] == list(range(5))
    assert len(queue) == 0


@pytest.mark.parametrize("what", ["weight", "cost"])
def test_who_has_more_weight_or_asks_for_less_is_served_more_often(what: str) -> None:
    queue = a_queue()
    fill(queue, "a", 100, **({"weight": 3.0} if what == "weight" else {"cost": 1.0}))
    fill(queue, "b", 100, **({"weight": 1.0} if what == "weight" else {"cost": 3.0}))

    served = Counter(names(take(queue, 80)))

    assert served["a"] == pytest.approx(60, abs=2)


def test_a_higher_priority_goes_first_whoever_asks() -> None:
    queue = a_queue()
    fill(queue, "a", 3, priority=1)
    fill(queue, "b", 2, priority=9)
    fill(queue, "c", 1, priority=5)

    assert names(take(queue, 6)) == "bbcaaa"


def test_a_newcomer_is_next_however_long_the_flood_has_waited() -> None:
    queue = a_queue()
    fill(queue, "f", 500, cost=50.0)
    take(queue, 100)
    fill(queue, "n", 1, cost=5000.0)

    assert "n" in names(take(queue, 2))


def test_idle_time_earns_nothing() -> None:
    queue = a_queue()
    fill(queue, "a", 200)
    take(queue, 100)
    fill(queue, "b", 200)

    assert Counter(names(take(queue, 40)))["b"] == pytest.approx(20, abs=1)


def test_when_it_is_full_the_longest_backlog_loses_its_newest() -> None:
    queue = a_queue(max_length=10)
    assert fill(queue, "a", 8) == []
    assert fill(queue, "b", 2) == []

    assert fill(queue, "c", 3) == [Item("a", 7), Item("a", 6), Item("a", 5)]
    assert fill(queue, "a", 1, first=9) == [Item("a", 9)]  # it is the longest itself
    assert len(queue) == 10


def test_backlogs_are_compared_by_weight() -> None:
    queue = a_queue(max_length=10)
    fill(queue, "a", 6, weight=6.0)
    fill(queue, "b", 4)

    assert names(fill(queue, "c", 1)) == "b"


def test_of_a_tenant_the_lowest_priority_loses_first() -> None:
    queue = a_queue(max_length=4)
    tenant = Tenant(name="a")
    for number, priority in enumerate((5, 1, 9, 5)):
        queue.push(Item("a", number), tenant, priority=priority)

    assert queue.push(Item("b", 0), Tenant(name="b"), priority=0) == [Item("a", 1)]


def test_large_bodies_count_too() -> None:
    queue = a_queue(max_size=100)
    fill(queue, "small", 10, size=1)
    assert fill(queue, "large", 3, size=30) == []

    assert fill(queue, "small", 1, size=1, first=20) == [Item("large", 2)]
    assert fill(queue, "huge", 1, size=101) == [Item("huge", 0)]
    assert fill(queue, "late", 1, size=20) == []


def test_one_that_may_not_have_a_place_is_passed_over_and_stays() -> None:
    queue = a_queue()
    fill(queue, "a", 2)
    fill(queue, "b", 2)

    assert queue.pop(lambda item: item.tenant == "b") == Item("b", 0)
    assert queue.pop(lambda item: item.number == 1 and item.tenant == "a") is None
    assert len(queue) == 3
    assert sorted(names(take(queue, 3))) == ["a", "a", "b"]


def test_an_estimate_of_who_goes_before() -> None:
    queue = a_queue()
    fill(queue, "a", 50)
    fill(queue, "b", 3)
    fill(queue, "high", 4, priority=9)

    assert queue.ahead_of(Tenant(name="new"), 5) == 4 + 1 + 1
    assert queue.ahead_of(Tenant(name="a"), 5) == 4 + 50 + 3
    assert queue.ahead_of(Tenant(name="b"), 5) == 4 + 3 + 4


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "pop", "pop some", "remove"]),
        st.sampled_from("abcd"),
        st.integers(0, 9),
        st.integers(0, 40),
    ),
    max_size=200,
)


@settings(deadline=None, max_examples=200)
@given(_EVENTS)
def test_whatever_happens_nothing_is_lost_or_served_twice(
    events: list[tuple[str, str, int, int]],
) -> None:
    queue = a_queue(max_length=12, max_size=150)
    waiting: dict[Item, int] = {}
    order: dict[tuple[str, int], list[Item]] = {}
    for number, (event, name, priority, size) in enumerate(events):
        if event == "push":
            item, tenant = Item(name, number), Tenant(name=name, weight=1 + size % 3)
            waiting[item] = priority
            order.setdefault((name, priority), []).append(item)
            for lost in queue.push(item, tenant, priority=priority, cost=size, size=size):
                order[lost.tenant, waiting.pop(lost)].remove(lost)
        elif event == "remove" and waiting:
            item = list(waiting)[number % len(waiting)]
            assert queue.remove(item)
            assert not queue.remove(item)
            order[item.tenant, waiting.pop(item)].remove(item)
        elif event.startswith("pop"):
            refused = name if event == "pop some" else ""
            item = queue.pop(lambda each, refused=refused: each.tenant != refused)
            free = {each: p for each, p in waiting.items() if each.tenant != refused}
            assert (item is None) == (not free)
            if item is not None:
                level = waiting.pop(item)
                assert level == max(free.values())
                assert order[item.tenant, level].pop(0) == item
        assert len(queue) == len(waiting) <= 12
    assert set(take(queue, len(waiting))) == set(waiting)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0.1, 10), min_size=2),
    st.lists(st.floats(1, 100), min_size=300, max_size=300),
)
def test_nobody_who_waits_falls_behind_by_more_than_its_largest_requests(
    weights: dict[str, float], costs: list[float]
) -> None:
    queue = a_queue(max_length=100_000)
    for name, weight in weights.items():
        for number, cost in enumerate(costs):
            queue.push(Item(name, number), Tenant(name=name, weight=weight), priority=5, cost=cost)
    service = dict.fromkeys(weights, 0.0)
    for _ in range(200):  # so few that everybody has some left
        item = queue.pop(lambda _: True)
        service[item.tenant] += costs[item.number] / weights[item.tenant]
        for (one, its), (other, theirs) in combinations(weights.items(), 2):
            bound = 100 / its + 100 / theirs  # theorem 1 of Goyal et al.
            assert abs(service[one] - service[other]) <= bound + 1e-6
