"""WeightEvents: downloads of weights, as events of the fleet."""

from __future__ import annotations

from cluster.event_log import EventLog
from cluster.messages import ReplicaReport
from cluster.model_cache import DOWNLOADING


class WeightEvents:
    """Tells `events` when a replica begins to download, and when it has ended."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._begun_s: dict[str, float] = {}  # by replica

    def heard(self, at_s: float, report: ReplicaReport) -> None:
        """A heartbeat came at `at_s` (epoch seconds)."""
        downloading = report.stage.startswith(DOWNLOADING) and report.state == "starting"
        if downloading and report.replica not in self._begun_s:
            self._begun_s[report.replica] = at_s
            size = report.stage.rpartition(" of ")[2]
            self._note(at_s, report, f"downloading {size} of weights to {report.node}")
        elif not downloading and report.replica in self._begun_s:
            seconds = at_s - self._begun_s.pop(report.replica)
            end = "failed" if report.state == "failed" else "done"
            text = f"download of weights to {report.node}: {end} after {seconds:.0f} s"
            self._note(at_s, report, text)

    def _note(self, at_s: float, report: ReplicaReport, text: str) -> None:
        self._events.note(
            at_s, "weights", text, model=report.model, replica=report.replica, node=report.node
        )
