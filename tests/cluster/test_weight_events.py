from __future__ import annotations

from pathlib import Path

import pytest

from cluster.event_log import EventLog
from cluster.weight_events import WeightEvents
from tests.builders import a_report


@pytest.mark.parametrize(("state", "end"), [("ready", "done"), ("failed", "failed")])
def test_a_download_is_two_events_however_many_heartbeats_it_takes(
    tmp_path: Path, state: str, end: str
):
    log = EventLog(tmp_path / "events")
    weights = WeightEvents(log)
    stages = ["waiting for weights", "downloading weights, 0 % of 48.0 GiB"]
    for at_s, stage in enumerate([*stages, "downloading weights, 50 % of 48.0 GiB"]):
        weights.heard(float(at_s), a_report(state="starting", stage=stage, node="a"))
    weights.heard(61.0, a_report(state=state, stage="", node="a"))
    weights.heard(62.0, a_report(state=state, stage="", node="a"))

    assert [event.text for event in log] == [
        "downloading 48.0 GiB of weights to a",
        f"download of weights to a: {end} after 60 s",
    ]
    assert {event.kind for event in log} == {"weights"}
