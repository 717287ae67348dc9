"""When a gang must start anew: a rank that is gone, silent, or does not meet the others."""

from __future__ import annotations

from typing import Any

from cluster.engines.adapter import MEETING
from cluster.gang_state import GangWatch, RankState


def a_rank(number: int, **changes: Any) -> RankState:
    fields: dict[str, Any] = {"node": "ab"[number], "heard_s": 0.0}
    return RankState(number, **{**fields, **changes})


def a_watch() -> GangWatch:
    watch = GangWatch(rendezvous_s=60, silent_s=10)
    watch.master = "10.0.0.1:29500"
    return watch


def test_ranks_that_start_run_and_answer_are_sound():
    watch = a_watch()
    for now_s, stage in enumerate(("starting the engine", MEETING, "loading weights", "")):
        assert watch.fault([a_rank(0, stage=stage), a_rank(1, stage=stage)], now_s) == ""


def test_a_rank_that_ended_ends_the_gang_with_the_end_of_its_log_and_the_cause_last():
    fault = a_watch().fault([a_rank(0), a_rank(1, status=-9, log_tail="out of memory")], 1)

    assert fault == "out of memory\nrank 1 on b ended with status -9, and the gang with it"


def test_what_is_said_of_a_rank_ends_with_where_its_log_is():
    log = {"log_file": "/logs/r1.log"}
    changes: list[dict[str, Any]] = [{"status": 1}, {"gone": "the node died"}]

    faults = [a_watch().fault([a_rank(0), a_rank(1, **each, **log)], 0) for each in changes]
    watch = a_watch()
    for now_s in range(12):
        last = watch.fault([a_rank(0, heard_s=now_s), a_rank(1, **log)], now_s)

    assert all(fault.endswith(" (log: /logs/r1.log)") for fault in (*faults, last))


def test_a_rank_that_ended_with_success_ends_the_gang_too():
    assert "ended with status 0" in a_watch().fault([a_rank(0), a_rank(1, status=0)], 1)


def test_a_rank_whose_actor_is_gone_ends_the_gang():
    fault = a_watch().fault([a_rank(0), a_rank(1, gone="the node died")], 1)

    assert fault == "rank 1 on b is gone: the node died"


def test_a_short_silence_is_borne_a_long_one_is_not():
    watch = a_watch()

    faults = [watch.fault([a_rank(0, heard_s=now), a_rank(1)], now) for now in range(12)]

    assert faults[:11] == [""] * 11
    assert faults[11] == "rank 1 on b has not been heard of for 11 s"


def test_nobody_was_silent_while_the_leader_was_held_up():
    watch = a_watch()
    watch.fault([a_rank(0), a_rank(1)], 0)

    assert watch.fault([a_rank(0), a_rank(1)], 20) == ""


def test_ranks_that_do_not_meet_are_told_apart_from_those_that_are_not_there_yet():
    watch = a_watch()
    ranks = [a_rank(0, stage=MEETING, heard_s=60), a_rank(1, stage="starting workers", heard_s=60)]

    assert watch.fault(ranks, 60) == ""

    late = a_rank(1, stage="starting", heard_s=121, log_file="/logs/r1.log")
    later = [a_rank(0, stage=MEETING, heard_s=121), late]
    fault = watch.fault(later, 121)
    assert "have not met at 10.0.0.1:29500 within 60 s" in fault
    assert "rank 0 on a waits there; not so rank 1 on b: starting (log: /logs/r1.log)" in fault
    assert "GLOO_SOCKET_IFNAME" in fault


def test_the_time_to_meet_begins_with_the_first_who_waits_not_with_downloads():
    watch = a_watch()

    assert watch.fault([a_rank(0, heard_s=900), a_rank(1, heard_s=900)], 900) == ""
    assert watch.fault([a_rank(0, stage=MEETING, heard_s=901), a_rank(1, heard_s=901)], 901) == ""


def test_who_has_met_may_take_any_time_to_load():
    watch = a_watch()
    watch.fault([a_rank(0, stage=MEETING), a_rank(1, stage=MEETING)], 1)
    watch.fault([a_rank(0, stage="loading weights"), a_rank(1, stage="loading weights")], 2)

    ranks = [a_rank(0, stage="compiling", heard_s=999), a_rank(1, stage="compiling", heard_s=999)]
    assert watch.fault(ranks, 999) == ""
