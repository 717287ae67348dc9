"""Whether a gang is sound: an engine with ranks on several nodes lives and dies as a whole.

A rank that is gone leaves the others waiting in a collective operation, healthy to look at, for
minutes. So what each node tells of its share is judged here, and any fault is the whole gang's. No
Ray, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.engines.adapter import MEETING

RENDEZVOUS_S = 300.0  # from the first rank that waits for the others; weights are loaded later
LATE_S = 5.0  # who looks so seldom was held up, and answers wait to be read
SILENT_S = 10.0  # a short cut of the network ends no gang: its connections outlive that


@dataclass(frozen=True, slots=True)
class RankState:
    """What the leader knows of one node's share."""

    node_rank: int
    node: str
    stage: str = ""  # of its start; empty: started
    status: int | None = None  # that its engine ended with; None: it runs
    heard_s: float = 0.0  # when it last answered, on a clock that only grows
    log_file: str = ""
    log_tail: str = ""
    gone: str = ""  # why its actor is no more

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"rank {self.node_rank} on {self.node}"

    @property
    def where(self) -> str:
        """Where more of it can be read, as errors end."""
        return f" (log: {self.log_file})" if self.log_file else ""


class GangWatch:
    """Judges a gang again and again, from when its actors are up. It meets at `master`, later."""

    def __init__(self, *, rendezvous_s: float = RENDEZVOUS_S, silent_s: float = SILENT_S) -> None:
        self.master = ""
        self._rendezvous_s = rendezvous_s
        self._silent_s = silent_s
        self._met = False
        self._meeting_since_s: float | None = None
        self._looked_s: float | None = None
        self._listening_since_s = 0.0

    def fault(self, ranks: Sequence[RankState], now_s: float) -> str:
        """Why the gang must start anew; empty: it need not."""
        if self._looked_s is None or now_s - self._looked_s > LATE_S:
            self._listening_since_s = now_s
        self._looked_s = now_s
        for rank in ranks:
            if rank.gone:
                return f"{rank.name} is gone: {rank.gone}{rank.where}"
        for rank in ranks:
            if rank.status is not None:
                said = f"{rank.log_tail}\n" if rank.log_tail else ""
                return (
                    f"{said}{rank.name} ended with status {rank.status}, and the gang with it"
                    f"{rank.where}"
                )
        for rank in ranks:
            silent_s = now_s - max(rank.heard_s, self._listening_since_s)
            if silent_s > self._silent_s:
                return f"{rank.name} has not been heard of for {silent_s:.0f} s{rank.where}"
        return "" if self._met else self._rendezvous(ranks, now_s)

    def _rendezvous(self, ranks: Sequence[RankState], now_s: float) -> str:
        meeting = [rank for rank in ranks if rank.stage == MEETING]
        if self._meeting_since_s is None:
            self._meeting_since_s = now_s if meeting else None
        elif not meeting:
            self._met = True
        elif now_s - self._meeting_since_s > self._rendezvous_s:
            there = ", ".join(f"{rank.name}{rank.where}" for rank in meeting)
            others = [rank for rank in ranks if rank not in meeting]
            missing = ", ".join(
                f"{rank.name}: {rank.stage or 'started'}{rank.where}" for rank in others
            )
            return (
                f"the ranks have not met at {self.master} within {self._rendezvous_s:.0f} s: "
                f"{there} wait{'s' if len(meeting) == 1 else ''} there"
                f"{f'; not so {missing}' if missing else ''}. Can these nodes reach each other on "
                f"every port, by the interface that their address is on (NCCL_SOCKET_IFNAME and "
                f"GLOO_SOCKET_IFNAME on a node say otherwise)?"
            )
        return ""
