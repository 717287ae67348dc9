"""SpeedMeter: gathers what an engine says of itself twice a second into windows."""

from __future__ import annotations

from dataclasses import replace

from cluster.engines.adapter import EngineLoad
from placement.speed_window import Sample, SpeedWindow, is_full, window_of

SHORTEST_S = 20.0
LONGEST_S = 300.0  # then the window ends, whatever is in it
GAP_S = 5.0  # nobody looked for so long: what happened meanwhile is not known


class SpeedMeter:
    """`window` is the last one that is whole.

    The first is not told: an engine that was just started warms up in it.
    """

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._load: EngineLoad | None = None
        self._tasks: frozenset[tuple[int, int]] = frozenset()
        self._answers = 0  # tasks that were seen
        self._ended = 0  # windows, with the one that is not told
        self.window: SpeedWindow | None = None

    def note(self, load: EngineLoad, now_s: float) -> None:
        """What the engine said at `now_s`, of a clock that never goes back."""
        if load is self._load:  # it did not answer, and this is what it said before
            return
        self._load = load
        if load.counters is None:
            self.interrupt()
            return
        counters = load.counters
        if load.tasks is not None:
            self._answers += len(load.tasks - self._tasks)
            self._tasks = load.tasks
            counters = replace(counters, prompts=self._answers)
        sample = Sample(now_s, load.running, load.waiting, counters, load.tasks is None)
        if self._samples and not _goes_on(self._samples, sample):
            self.interrupt()
        self._samples.append(sample)
        if now_s - self._samples[0].at_s >= SHORTEST_S:
            self._end(now_s)

    def interrupt(self) -> None:
        """What was gathered is not of one piece."""
        self._samples = []

    def _end(self, now_s: float) -> None:
        window = window_of(self._samples)
        full = window is not None and is_full(window)
        if not full and now_s - self._samples[0].at_s < LONGEST_S:
            return
        self._samples = self._samples[-1:]
        if window is None:
            return
        self._ended += 1
        if self._ended > 1:
            self.window = window.model_copy(update={"number": self._ended - 1})


def _goes_on(samples: list[Sample], sample: Sample) -> bool:
    """Whether it belongs to the same window: looked at in time, and with something to do.

    A window begins with its first request, not in the idle time before.
    """
    first, last = samples[0], samples[-1]
    if sample.at_s - last.at_s > GAP_S or sample.counters.since(last.counters) is None:
        return False
    return sample.running > 0 or sample.counters.prompts > first.counters.prompts
