from __future__ import annotations

import pytest

from loadtests.gpu_pods import RULES, Pod, Pods, all_at_once, one_by_one

ANY: frozenset[str] = frozenset()


def whole(gpus: int, *types: str) -> Pod:
    return Pod(gpus=gpus, milli=1000, types=frozenset(types))


def test_pods_that_block_each_other_one_by_one_fit_all_at_once() -> None:
    pods = Pods(
        arrivals=(whole(1), whole(1), whole(1, "T4"), whole(1, "T4"), whole(2, "V100")),
        nodes={("T4", 2): 1, ("V100", 4): 1},
    )

    assert one_by_one(pods, RULES["first fit"]) == (4.0, 2)
    given, bound, _ = all_at_once(pods)
    assert given == bound == 6.0


def test_shares_of_a_gpu_lie_together() -> None:
    pods = Pods(
        arrivals=tuple(Pod(1, milli, ANY) for milli in (600, 600, 400, 400)),
        nodes={("T4", 2): 1},
    )

    assert all_at_once(pods)[0] == pytest.approx(2.0)
    assert one_by_one(pods, RULES["best fit"]) == (pytest.approx(2.0), 0)
