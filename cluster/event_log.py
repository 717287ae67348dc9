"""EventLog: what happened to the fleet, bounded, kept over a restart of the controller."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from cluster.files import replace_text
from cluster.messages import Event, EventKind, ReplicaReport, ReplicaState

CAPACITY = 1000
_KINDS: dict[ReplicaState, EventKind] = {
    "starting": "replica-started",
    "ready": "replica-ready",
    "unhealthy": "replica-unhealthy",
    "draining": "replica-draining",
    "stopped": "replica-stopped",
    "failed": "replica-died",
}
log = logging.getLogger("bora.events")


class EventLog:
    """The last `capacity` events, numbered from 1; each is a line of `path` at once."""

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        self._path = path
        kept, self._lines, self._cut = _read(path)
        self._events: deque[Event] = deque(kept, maxlen=capacity)
        self._unreplaced: dict[str, deque[str]] = {}  # replicas that died, by variant

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events)

    def after(self, number: int) -> tuple[Event, ...]:
        """Those that came after the one with this number."""
        return tuple(event for event in self._events if event.number > number)

    def note(
        self,
        at_s: float,
        kind: EventKind,
        text: str,
        *,
        model: str = "",
        replica: str = "",
        node: str = "",
        reason: str = "",
    ) -> None:
        """Keep one more. `at_s`: epoch seconds."""
        event = Event(
            number=self._events[-1].number + 1 if self._events else 1,
            at_s=at_s,
            kind=kind,
            model=model,
            replica=replica,
            node=node,
            text=text,
            reason=reason,
        )
        self._events.append(event)
        log.info("%s %s %s: %s", kind, model, node, text)
        try:
            self._write(event)
        except OSError:
            log.exception("the event could not be kept on disk")

    def replica(self, at_s: float, report: ReplicaReport) -> None:
        """A replica is new or in another state."""
        reason = ""
        if report.state == "failed":
            reason = next(iter((report.log_tail or report.stage).strip().splitlines()[-1:]), "")
            self._died(report)
        elif report.state == "starting" and (waiting := self._unreplaced.get(report.variant)):
            reason = f"replaces {waiting.popleft()}"
        self.note(
            at_s,
            _KINDS[report.state],
            f"replica {report.replica}: {report.state}",
            model=report.model,
            replica=report.replica,
            node=report.node,
            reason=reason,
        )

    def lost(self, at_s: float, report: ReplicaReport, why: str) -> None:
        """A replica fell silent or is gone without a word."""
        self._died(report)
        self.note(
            at_s,
            "replica-lost",
            f"replica {report.replica}: {why}",
            model=report.model,
            replica=report.replica,
            node=report.node,
        )

    def _died(self, report: ReplicaReport) -> None:
        self._unreplaced.setdefault(report.variant, deque(maxlen=64)).append(report.replica)

    def _write(self, event: Event) -> None:
        if self._lines >= 2 * (self._events.maxlen or CAPACITY):
            text = "".join(f"{each.model_dump_json()}\n" for each in self._events)
            replace_text(self._path, text)
            self._lines, self._cut = len(self._events), False
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{chr(10) if self._cut else ''}{event.model_dump_json()}\n")
        self._lines, self._cut = self._lines + 1, False


def _read(path: Path) -> tuple[list[Event], int, bool]:
    """What a controller before us kept, in how many lines, and whether it did not finish the last.

    Lines that are no events are left out.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return [], 0, False
    except OSError:
        log.exception("%s cannot be read: earlier events are not told", path)
        return [], 0, False
    events, lines = [], text.split(b"\n")
    for line in lines:
        with contextlib.suppress(ValidationError):
            events.append(Event.model_validate_json(line))
    return events, len(lines) - 1, bool(lines[-1])
