"""Logs as they grow, on whatever node they lie, and the replicas that come and go meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.control_api import ControlClient
from cluster.errors import ClusterUnreachable
from cluster.log_tail import last_lines, lines_after
from cluster.messages import Event, LogPart, LogQuery, RankPlace, ReplicaStatus

POLL_S = 0.2
REMOTE_POLL_S = 1.0  # by way of the controller
ENDED_S = 10.0  # after the end of a replica its last lines have been read
OVER = ("failed", "stopped")


class LogReader:
    """A log; it need not exist yet. What is not on this host is asked of the `client`."""

    def __init__(
        self, file: Path, *, node: str = "", node_id: str = "", client: ControlClient | None = None
    ) -> None:
        self.file = file
        self.problem = ""
        self._node = node
        self._node_id = node_id
        self._client = client
        self._offset = 0
        self._next_s = 0.0

    @property
    def name(self) -> str:
        """As lines are marked with it."""
        return self.file.stem

    @property
    def place(self) -> str:
        """As headings name it."""
        return f"{self._node}:{self.file}" if self._is_elsewhere else str(self.file)

    @property
    def _is_elsewhere(self) -> bool:
        return self._client is not None and bool(self._node_id) and not self.file.exists()

    def last(self, count: int, *, partial: bool) -> LogPart:
        """The last lines; `more` goes on after them."""
        if self._client is None or not self._is_elsewhere:
            part = last_lines(self.file, count, partial=partial)
        else:
            query = self._query(lines=count, partial=partial)
            part = self._client.logs(query)
        return self._taken(part)

    def more(self) -> Sequence[str]:
        """Whole lines that came since."""
        if self._client is None or not self._is_elsewhere:
            return self._taken(lines_after(self.file, self._offset)).lines
        if time.monotonic() < self._next_s:
            return ()
        self._next_s = time.monotonic() + REMOTE_POLL_S
        return self._taken(self._client.logs(self._query(offset=self._offset))).lines

    def _query(self, **what: object) -> LogQuery:
        return LogQuery.model_validate({"node_id": self._node_id, "file": str(self.file), **what})

    def _taken(self, part: LogPart) -> LogPart:
        self.problem = part.problem
        if not (part.missing or part.problem):
            self._offset = part.offset
        return part


class ReplicaWatch:
    """The replicas of `model`, as they come and go; with `only`, those and who replaces them."""

    def __init__(
        self, client: ControlClient, model: str, only: Sequence[str] | None = None
    ) -> None:
        self._client = client
        self._model = model
        self._only = None if only is None else set(only)
        self._last_event = max((each.number for each in client.events().events), default=0)
        self._seen_s: dict[Path, float] = {}
        self._next_s = 0.0
        self._silent = False

    def look(self, readers: dict[Path, LogReader]) -> list[str]:
        """Once a second: what happened, in words; `readers` get those who came."""
        if time.monotonic() < self._next_s:
            return []
        self._next_s = time.monotonic() + REMOTE_POLL_S
        try:
            told = [self._told(event) for event in self._news()]
            self._add(readers)
        except ClusterUnreachable as error:
            said, self._silent = self._silent, True
            return [] if said else [f"{error}; logs on this host go on"]
        if self._silent:
            self._silent = False
            told.append("the controller answers again")
        return told

    def _news(self) -> list[Event]:
        if self._silent and not any(
            event.number >= self._last_event for event in self._client.events().events
        ):
            self._last_event = 0  # a new head began to count anew
        found = []
        for event in self._client.events(self._last_event).events:
            self._last_event = event.number
            if event.model == self._model and event.kind.startswith("replica-"):
                replaced = event.reason.removeprefix("replaces ")
                if self._only is not None and replaced in self._only:
                    self._only.add(event.replica)
                if self._only is None or event.replica in self._only:
                    found.append(event)
        return found

    def _told(self, event: Event) -> str:
        reason = f" ({event.reason})" if event.reason else ""
        return f"{event.text} on {event.node}{reason}" if event.node else f"{event.text}{reason}"

    def _add(self, readers: dict[Path, LogReader]) -> None:
        """Begin with replicas that came; end with those of which nothing more will come."""
        now_s = time.monotonic()
        for reader in self._living():
            self._seen_s[reader.file] = now_s
            readers.setdefault(reader.file, reader)
        for file in list(readers):
            if now_s - self._seen_s.setdefault(file, now_s) > ENDED_S:
                del readers[file]

    def _living(self) -> list[LogReader]:
        return [
            reader
            for variant in self._client.status().variants
            for replica in (variant.replicas if variant.model == self._model else ())
            if replica.state not in OVER and (self._only is None or replica.replica in self._only)
            for reader in readers_of(replica, self._client)
        ]


def readers_of(replica: ReplicaStatus, client: ControlClient) -> list[LogReader]:
    """Of its engine, and of the engine's ranks on other nodes."""
    ranks: list[ReplicaStatus | RankPlace] = [replica, *replica.followers]
    return [
        LogReader(Path(rank.log_file), node=rank.node, node_id=rank.node_id, client=client)
        for rank in ranks
        if rank.log_file
    ]


def follow(readers: Sequence[LogReader], watch: ReplicaWatch | None) -> None:
    """Print what comes, for ever; who is replaced is followed on in the one that replaces it."""
    followed = {reader.file: reader for reader in readers}
    marked = len(followed) > 1
    while True:
        for text in watch.look(followed) if watch else ():
            print(f"==> {text} <==")
        marked = marked or len(followed) > 1
        for file, reader in list(followed.items()):
            try:
                lines = reader.more()
            except ClusterUnreachable:
                continue  # the watch says so
            for line in lines:
                print(f"{reader.name}: {line}" if marked else line)
            if reader.problem:
                print(f"==> {reader.place}: {reader.problem} <==")
                del followed[file]
        sys.stdout.flush()
        time.sleep(POLL_S)
