"""Second tries: Serve is asked once more for replicas that it gave up though no engine had failed.

Serve counts a replica whose host dies while it starts as one that cannot start, and after three of
them starts no more. A box of eight GPUs may hold that many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.event_log import EventLog
from cluster.generations import RUNNING, Census, GenerationKey, key_of
from placement.plan import Variant

_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 120.0


class Asks(Protocol):
    """What Serve is asked for."""

    async def again(self, variant: Variant, count: int) -> None:
        """Have `count` replicas of a generation that Serve gave up; those that run stay."""
        ...


@dataclass(slots=True)
class _Tries:
    pause_s: float
    next_s: float  # monotonic, as a census'


class SecondTries:
    """`failing(key)`: an engine of that generation told why it did not start."""

    def __init__(
        self, deployer: Asks, events: EventLog, failing: Callable[[GenerationKey], bool]
    ) -> None:
        self._deployer = deployer
        self._events = events
        self._failing = failing
        self._tries: dict[GenerationKey, _Tries] = {}

    async def step(
        self, variants: Sequence[Variant], now: Census, counts: Callable[[Variant], int]
    ) -> None:
        """Ask for what Serve gave up; of one that is given up again and again, less and less often."""
        wanted = {key_of(variant): variant for variant in variants}
        self._tries = {key: each for key, each in self._tries.items() if key in wanted}
        for key, variant in wanted.items():
            served = now.generations.get(key)
            if served is None or served.deleting:
                continue
            if not served.gave_up:
                if served.count(*RUNNING) >= served.target:
                    self._tries.pop(key, None)
            elif not self._failing(key):
                await self._try(variant, now.begun_s, counts(variant))

    async def _try(self, variant: Variant, now_s: float, count: int) -> None:
        key = key_of(variant)
        tries = self._tries.setdefault(key, _Tries(_FIRST_PAUSE_S, now_s))
        if now_s < tries.next_s:
            return
        tries.next_s = now_s + tries.pause_s
        tries.pause_s = min(2 * tries.pause_s, _LONGEST_PAUSE_S)
        text = f"{variant.variant}: Ray Serve gave up starting replicas; asked for once more"
        why = "none of them told of a failure, so it was their hosts'"
        self._events.note(time.time(), "note", text, model=variant.model, reason=why)
        await self._deployer.again(variant, count)
