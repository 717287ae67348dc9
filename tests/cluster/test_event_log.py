"""What happened is told, numbered, bounded, and outlives the controller."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from cluster.autoscaler import Autoscaler
from cluster.cli.events import event_table
from cluster.cli.render import age
from cluster.cli.status_page import status_page
from cluster.event_log import EventLog
from cluster.generations import Census
from cluster.lifecycle import Lifecycle
from cluster.messages import FleetStatus, ReplicaState
from cluster.registry import Registry
from cluster.status import variant_status
from gateway.endpoints import ModelLoad
from tests.builders import a_report, a_variant
from tests.cluster.recording_counts import RecordingCounts, RecordingRooms


def a_log(tmp_path: Path, capacity: int = 100) -> EventLog:
    return EventLog(tmp_path / "events.jsonl", capacity)


def a_lifecycle(log: EventLog) -> Lifecycle:
    return Lifecycle(
        Registry(),
        Autoscaler(),
        RecordingCounts(),
        variants=lambda: (),
        events=log,
        take=lambda: Census(0.0, {}, frozenset(), {}),
        drain_node=lambda *_: None,
        fetch=_no_fetch,
        rooms=RecordingRooms(),
    )


async def _no_fetch(*_: object) -> None:
    raise AssertionError("nothing is rolled out")


def test_events_are_numbered_and_told_from_where_one_stopped(tmp_path):
    log = a_log(tmp_path)
    for index in range(3):
        log.note(float(index), "scaled", f"to {index}", model="chat")

    assert [event.number for event in log] == [1, 2, 3]
    assert [event.text for event in log.after(2)] == ["to 2"]
    assert log.after(3) == ()


def test_a_new_controller_goes_on_counting(tmp_path):
    a_log(tmp_path).note(1.0, "deployed", "deployed", model="chat")

    again = a_log(tmp_path)
    again.note(2.0, "deleted", "deleted", model="chat")

    assert [(event.number, event.kind) for event in again] == [(1, "deployed"), (2, "deleted")]


def test_log_and_file_stay_bounded(tmp_path):
    log = a_log(tmp_path, capacity=10)
    for index in range(105):
        log.note(float(index), "note", str(index))

    assert [event.text for event in log] == [str(index) for index in range(95, 105)]
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) <= 20
    assert [event.number for event in a_log(tmp_path, 10)] == list(range(96, 106))


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    a_log(tmp_path).note(1.0, "note", "whole")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"number": 2, "at_')

    assert [event.text for event in a_log(tmp_path)] == ["whole"]


def test_a_line_that_was_cut_within_a_letter_is_left_out_and_the_next_is_whole(tmp_path):
    a_log(tmp_path).note(1.0, "note", "whole\u2028and in two lines")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write('{"number": 2, "text": "é'.encode()[:-1])

    a_log(tmp_path).note(2.0, "note", "after")

    assert [event.text for event in a_log(tmp_path)] == ["whole\u2028and in two lines", "after"]


def test_the_file_stays_bounded_when_controllers_come_and_go(tmp_path):
    for index in range(12):
        log = a_log(tmp_path, capacity=10)
        for _ in range(8):
            log.note(float(index), "note", str(index))

    assert len((tmp_path / "events.jsonl").read_text().splitlines()) <= 20


def test_a_file_that_cannot_be_read_is_told_and_ends_no_controller(tmp_path, caplog):
    (tmp_path / "events.jsonl").mkdir()  # as root everything may be read

    a_log(tmp_path).note(1.0, "note", "now")

    assert "events.jsonl cannot be read" in caplog.text


def test_events_are_shown_as_they_are(tmp_path):
    """What an engine said last may look like markup."""
    log = a_log(tmp_path)
    log.note(1.0, "replica-died", "r1 [/]", model="[bold]", node="h[1]", reason="[/INST] [red]")
    console = Console(width=250, record=True, file=io.StringIO())

    console.print(event_table(tuple(log)))

    page = console.export_text()
    assert all(part in page for part in ("r1 [/]", "[bold]", "h[1]", "[/INST] [red]"))


def test_a_replica_that_died_is_told_with_its_reason_and_its_successor_as_such(tmp_path):
    log = a_log(tmp_path)
    states: list[tuple[str, ReplicaState]] = [
        ("r1", "ready"), ("r1", "failed"), ("r2", "starting"), ("r2", "ready"), ("r3", "starting"),
    ]  # fmt: skip
    for replica, state in states:
        report = a_report(replica=replica, state=state, node="h1", log_tail="a\nout of memory\n")
        log.replica(1.0, report)

    assert [(event.kind, event.replica, event.reason) for event in log] == [
        ("replica-ready", "r1", ""),
        ("replica-died", "r1", "out of memory"),
        ("replica-started", "r2", "replaces r1"),
        ("replica-ready", "r2", ""),
        ("replica-started", "r3", ""),
    ]
    assert {event.node for event in log} == {"h1"}


def test_a_silent_replica_is_lost_and_replaced(tmp_path):
    log = a_log(tmp_path)
    log.lost(1.0, a_report(replica="r1", node="h1"), "no heartbeat, taken out")
    log.replica(2.0, a_report(replica="r2", state="starting"))

    lost, started = log
    assert (lost.kind, lost.node) == ("replica-lost", "h1")
    assert started.reason == "replaces r1"


def test_ages_read_like_ages():
    assert [age(s) for s in (-1, 5, 119, 600, 86_400, 10 * 86_400)] == [
        "0 s", "5 s", "119 s", "10 min", "24 h", "10 d",
    ]  # fmt: skip


def test_status_shows_where_replicas_run_what_they_take_and_what_happened_last(tmp_path):
    log = a_log(tmp_path)
    log.note(90.0, "deployed", "deployed", model="chat")
    variant = variant_status(
        a_variant(gpu="H100-SXM", gpus_per_replica=2),
        [
            a_report(replica="r1", node="h1", gpus=(0, 1), weights_bytes=48 * 2**30),
            a_report(replica="r2", node="h2", gpus=(4, 5), kv_cache_tokens=1000),
        ],
        ready=2,
        wanted=3,
        load=ModelLoad(requests_total=0, in_flight=1.5, queued=0),
        events=log,
        failure="",
        lifecycle=a_lifecycle(log),
        speed=None,
        now_s=130.0,
    )
    variant = variant.model_copy(
        update={
            "waiting": "a replica waits for 2 GPU",
            "misplaced": ("r1 runs elsewhere",),
            "rollout": "1 of 3 in the new shape",
        }
    )
    status = FleetStatus(
        fleet="test", table_version=1, variants=(variant,), gateways=("g",), events=tuple(log)
    )
    console = Console(width=250, record=True, file=io.StringIO())

    console.print(status_page(status, now_s=150.0))
    console.print(event_table(tuple(log)))

    page = console.export_text()
    assert "2/3" in page
    assert "4 x H100-SXM: h1 (2), h2 (2)" in page
    assert "h1 GPU 0,1" in page
    assert "43.8/48" in page
    assert "122k/1,000" in page
    assert "chat  60 s deployed" in page
    assert "chat: a replica waits for 2 GPU" in page
    assert "chat: not as planned: r1 runs elsewhere" in page
    assert "chat: roll-out: 1 of 3 in the new shape" in page
    assert "1.5+0" in page


def test_status_has_a_column_for_roles_only_where_replicas_have_some(tmp_path):
    log = a_log(tmp_path)

    def page(*roles: str) -> str:
        variants = tuple(
            variant_status(
                a_variant(role=role),
                [a_report(replica=f"r-{role}")],
                ready=1,
                wanted=1,
                load=ModelLoad(requests_total=0, in_flight=0, queued=0),
                events=log,
                failure="",
                speed=None,
                lifecycle=a_lifecycle(log),
                now_s=130.0,
            )
            for role in roles
        )
        status = FleetStatus(
            fleet="test", table_version=1, variants=variants, gateways=("g",), events=()
        )
        console = Console(width=250, record=True, file=io.StringIO())
        console.print(status_page(status, now_s=150.0))
        return console.export_text()

    assert "role" not in page("whole")
    split = page("prefill", "decode").splitlines()
    assert split[2].split()[:3] == ["variant", "role", "ready"]
    assert [line.split()[1] for line in split if line.startswith("chat@")] == ["prefill", "decode"]
