"""Windows: what an engine did for some time, from totals that it counts itself.

Samples are taken at regular intervals. What a token sees of n requests that run at once, n varying,
is not their mean but sum(n^2) / sum(n): more tokens are made while more run. With requests that come
at random this is the mean and one more, as in `queueing.py`; with a constant number it is that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import fmean

from placement.performance import Load
from placement.spec import Spec

LEAST_PROMPTS = 20
LEAST_INTERVALS = 200
_DRIFT = 1 / 3  # of the load, between the two halves of a window
_WAITING = 0.1  # of those that run; more is a queue
_SHORT_S = 2.0  # answers that are over sooner may be missed where an engine does not count them


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """Totals since an engine was started; all of them only grow."""

    prompts: float  # answers that have begun
    ttft_s: float  # summed over them
    prompt_tokens: float
    cached_tokens: float  # of these, in the prefix cache
    intervals: float  # between two tokens of an answer
    intervals_s: float  # summed over them
    preemptions: float = 0.0
    drafted: float = 0.0  # tokens

    def since(self, before: EngineCounters) -> EngineCounters | None:
        """What was added; None: counting began anew, so nobody knows."""
        pairs = zip(astuple(self), astuple(before), strict=True)
        more = [now - then for now, then in pairs]
        return EngineCounters(*more) if min(more) >= 0 else None


@dataclass(frozen=True, slots=True)
class Sample:
    """An engine at a moment."""

    at_s: float  # of a clock that never goes back
    running: int
    waiting: int
    counters: EngineCounters
    counts_answers: bool = True  # itself; else those that are over between two samples are missed


class SpeedWindow(Spec):
    """An engine's load and speed over `duration_s`; means, where nothing else is said."""

    number: int = 0  # of the engine's windows, from 1
    duration_s: float
    prompts: int
    intervals: int
    ttft_s: float
    tpot_s: float
    input_tokens: float
    output_tokens: float
    prefix_hit: float
    concurrency: float  # as a token sees it
    drift: float  # of those that run, from the window's first half to its second
    waiting: float
    preemptions: int = 0
    drafted: int = 0
    answer_s: float | None = None  # of an engine that does not count them; else None

    @property
    def load(self) -> Load:
        """In the words of the performance model."""
        return Load(
            concurrency=self.concurrency,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            prefix_hit=self.prefix_hit,
        )


def window_of(samples: Sequence[Sample]) -> SpeedWindow | None:
    """From samples in their order; None: nothing was done, or counting began anew."""
    if len(samples) < 3:
        return None
    first, *others = samples
    done, seconds = others[-1].counters.since(first.counters), others[-1].at_s - first.at_s
    busy = sum(each.running for each in others)
    if done is None or not busy or done.prompts < 1:
        return None
    # The first token of an answer follows none.
    intervals = done.intervals if first.counts_answers else done.intervals - done.prompts
    if intervals < 1:
        return None
    half = len(others) // 2
    early, late = (fmean(s.running for s in part) for part in (others[:half], others[half:]))
    return SpeedWindow(
        duration_s=seconds,
        prompts=round(done.prompts),
        intervals=round(intervals),
        ttft_s=done.ttft_s / done.prompts,
        tpot_s=done.intervals_s / intervals,
        input_tokens=max(1.0, done.prompt_tokens / done.prompts),
        # In a window that begins and ends in the middle of answers, tokens for each prompt.
        output_tokens=1 + intervals / done.prompts,
        prefix_hit=min(1.0, done.cached_tokens / max(done.prompt_tokens, 1.0)),
        concurrency=max(1.0, sum(each.running**2 for each in others) / busy),
        drift=abs(late - early),
        waiting=fmean(each.waiting for each in others),
        preemptions=round(done.preemptions),
        drafted=round(done.drafted),
        answer_s=None if first.counts_answers else busy / len(others) * seconds / done.prompts,
    )


def is_full(window: SpeedWindow) -> bool:
    """Whether there is enough in it for its means to say something."""
    return window.prompts >= LEAST_PROMPTS and window.intervals >= LEAST_INTERVALS


def flaw(window: SpeedWindow) -> str:
    """Why a window says nothing of the model's predictions; empty: it does."""
    crowd, answer_s = window.concurrency, window.answer_s
    answers = f"{window.prompts} answers in {window.duration_s:.0f} s"
    flaws = (
        (not is_full(window), f"{answers} are too few"),
        (min(window.ttft_s, window.tpot_s) <= 0, "the engine told no times"),
        (answer_s is not None and answer_s < _SHORT_S, f"{answers} may not be all: they are short"),
        (window.drafted > 0, "tokens were drafted, which was never measured"),
        (
            window.preemptions > 0 or window.waiting > 0.5 + _WAITING * crowd,
            f"overloaded: {window.waiting:.1f} requests waited on average",
        ),
        (
            window.drift > max(1.0, _DRIFT * crowd),
            f"the load changed by {window.drift:.1f} requests within it",
        ),
    )
    return next((why for is_so, why in flaws if is_so), "")
