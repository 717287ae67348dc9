import pytest

from loadtests.bench_streams import State, leaks, streams_that_fit
from loadtests.cycle_client import KINDS
from loadtests.stream_client import Group, request

MIB = 2**20


@pytest.mark.parametrize(
    ("after", "leak"),
    [
        (State(3, 0, 0, 70 * MIB), None),
        (State(2, 0, 0, 60 * MIB), None),
        (State(3, 0, 0, 75 * MIB), None),
        (State(4, 0, 0, 70 * MIB), "sockets: 3 -> 4"),
        (State(3, 1, 0, 70 * MIB), "1 in flight, 0 queued"),
        (State(3, 0, 2, 70 * MIB), "0 in flight, 2 queued"),
        (State(3, 0, 0, 80 * MIB), "memory by 10.0 MiB"),
    ],
)
def test_growth_between_two_idle_moments_is_a_leak(after: State, leak: str | None) -> None:
    assert leaks(State(3, 0, 0, 70 * MIB), after) == ([leak] if leak else [])


def test_a_stream_takes_two_files() -> None:
    assert streams_that_fit(10_000, 65_536) == 10_000
    assert streams_that_fit(10_000, 20_000) == 9_968


def test_lateness_is_what_exceeds_the_interval() -> None:
    group = Group(1, 1, begun=1, under_way_s=[0.001, 0.003], gaps_s=[1.99, 2.05])

    report = group.report(expected_gap_s=2.0)

    assert report["late_p99_s"] == pytest.approx(0.05)
    assert report["late_p50_s"] == pytest.approx(0.05)
    assert report["under_way_p50_s"] == 0.003


def test_cycles_cover_before_during_and_after_the_answer_and_the_engines_leaving() -> None:
    assert len(KINDS) == 10
    assert any(kind.sends == 0 for kind in KINDS.values())
    assert request(80, "late").endswith(b"}")
    assert b"Content-Length: " in request(80, "late")
