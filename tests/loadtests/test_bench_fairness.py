import math

import pytest

from loadtests.bench_fairness import SHAPES, Load, Result, Shape, Waits, waits

SHAPE = Shape("open", Load("open", 8), Load("open", 400))
LOG = """2026-11-22 INFO gateway: endpoint table 1
{"time": "x", "request_id": "open.alone-1", "status": 200, "queued_s": 0.0100}
{"time": "x", "request_id": "open.alone-2", "status": 200, "queued_s": 0.0300}
{"time": "x", "request_id": "open.beside-1", "status": 429, "queued_s": 0.5000}
"""


def of(p95_s: float, *, count: int = 50, failed: int = 0) -> Waits:
    return Waits(count, failed, p95_s / 2, p95_s)


def test_waits_are_read_from_the_access_log_by_tenant() -> None:
    assert waits(LOG, "open.alone-") == Waits(2, 0, 0.03, 0.03)
    assert waits(LOG, "open.beside-") == Waits(1, 1, 0.5, 0.5)
    assert waits(LOG, "open.flood-").count == 0


@pytest.mark.parametrize(
    ("alone", "beside", "flood", "fair"),
    [
        (of(0.1), of(0.149), of(2.0), True),
        (of(0.1), of(0.151), of(2.0), False),
        (of(0.0), of(SHAPE.floor_s), of(2.0), True),
        (of(0.0), of(SHAPE.floor_s + 0.001), of(2.0), False),
        (of(0.0), of(0.0, failed=1), of(2.0), False),
        (of(0.0), of(0.0, count=0), of(2.0), False),
        (of(0.0), of(0.0), of(0.001), False),  # that was no flood
    ],
)
def test_fair_is_half_as_long_again_or_below_the_floor(
    alone: Waits, beside: Waits, flood: Waits, *, fair: bool
) -> None:
    assert Result(SHAPE, alone, beside, flood).is_fair is fair


def test_floor_is_the_wait_of_who_is_always_next() -> None:
    assert SHAPE.floor_s == pytest.approx(3 * 0.1 / 16 + 0.005)


def test_ratio_to_no_wait_at_all_is_infinite() -> None:
    assert Result(SHAPE, of(0.0), of(0.01), of(1.0)).ratio == math.inf


def test_the_flood_is_fifty_times_the_other() -> None:
    assert [one.flood.size / one.quiet.size for one in SHAPES] == [50.0] * 4
