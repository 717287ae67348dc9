from __future__ import annotations

import pytest

from cluster.pace import Pace, period_s


def test_before_the_first_round_all_is_zero() -> None:
    told = Pace("loop").told()

    assert (told.rounds, told.p50_s, told.p99_s) == (0, 0.0, 0.0)


def test_the_slow_rounds_stand_in_the_last_percent() -> None:
    pace = Pace("loop")
    for number in range(101):
        pace.took(float(number))

    told = pace.told()

    assert (told.name, told.rounds, told.p50_s, told.p99_s) == ("loop", 101, 50.0, 99.0)


def test_a_round_that_fails_is_not_counted() -> None:
    pace = Pace("loop")

    with pytest.raises(ValueError, match="broken"), pace.round():
        raise ValueError("broken")

    assert pace.told().rounds == 0
    with pace.round():
        pass
    assert pace.told().rounds == 1


@pytest.mark.parametrize(
    ("replicas", "seconds"), [(0, 1.0), (1, 1.0), (100, 1.0), (150, 1.5), (200, 2.0), (5000, 2.0)]
)
def test_of_more_than_a_hundred_replicas_each_is_heard_less_often_but_within_two_seconds(
    replicas: int, seconds: float
):
    assert period_s(replicas) == seconds
