"""Second tries: Serve is asked once more for replicas that it gave up though no engine had failed.

Serve counts a replica whose host dies while it starts as one that cannot start, and after three of
them starts no more. A box of eight GPUs may hold that many. Where all tries come to nothing it is not
the hosts: such as bora's code is missing there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.event_log import EventLog
from cluster.generations import RUNNING, Census, GenerationKey, key_of
from placement.plan import Variant

_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 120.0
_HOPELESS = 3  # tries in a row


class Asks(Protocol):
    """What Serve is asked for."""

    async def again(self, variant: Variant, count: int) -> None:
        """Have `count` replicas of a generation that Serve gave up; those that run stay."""
        ...


@dataclass(slots=True)
class _Tries:
    pause_s: float
    next_s: float  # monotonic, as a census'
    count: int = 0


class SecondTries:
    """Of all generations of the plan; what happens is told to `events`."""

    def __init__(self, deployer: Asks, events: EventLog) -> None:
        self._deployer = deployer
        self._events = events
        self._tries: dict[GenerationKey, _Tries] = {}

    def hopeless(self, key: GenerationKey) -> bool:
        """Whether it was asked for so often that something is wrong with it."""
        tries = self._tries.get(key)
        return tries is not None and tries.count >= _HOPELESS

    async def step(
        self,
        variants: Sequence[Variant],
        now: Census,
        count: Callable[[Variant], int],
        failing: Callable[[GenerationKey], bool],
    ) -> None:
        """Ask for what Serve gave up; of one that is given up again and again, less and less often.

        `failing(key)`: an engine of it told why it did not start. A hopeless one that is to replace
        another is left alone: that one would make room for it.
        """
        wanted = {key_of(variant): variant for variant in variants}
        self._tries = {key: each for key, each in self._tries.items() if key in wanted}
        for key, variant in wanted.items():
            served = now.generations.get(key)
            if served is None or served.deleting:
                continue
            if not served.gave_up:
                if served.count(*RUNNING) >= served.target:
                    self._tries.pop(key, None)
            elif not failing(key) and not (self.hopeless(key) and _replaces(variant, wanted, now)):
                await self._try(variant, now.begun_s, count(variant))

    async def _try(self, variant: Variant, now_s: float, count: int) -> None:
        key = key_of(variant)
        tries = self._tries.setdefault(key, _Tries(_FIRST_PAUSE_S, now_s))
        if now_s < tries.next_s:
            return
        tries.next_s = now_s + tries.pause_s
        tries.pause_s = min(2 * tries.pause_s, _LONGEST_PAUSE_S)
        tries.count += 1
        text = f"{variant.variant}: Ray Serve gave up starting replicas; asked for once more"
        why = "none of them told of a failure: their hosts died, or could not run bora's code"
        self._events.note(time.time(), "note", text, model=variant.model, reason=why)
        await self._deployer.again(variant, count)


def _replaces(variant: Variant, wanted: Collection[GenerationKey], now: Census) -> bool:
    """Whether another shape of its model still runs."""
    return any(
        each.model == variant.model and not each.deleting and key not in wanted
        for key, each in now.generations.items()
    )
