"""Cross-validation: constants fitted without a model, or without a GPU type, judged on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean

from placement.fitted import FITTED, Constants
from placement.plan import Prediction
from tests.accuracy.fitting import fit
from tests.accuracy.latency import Run, kept, read_runs
from tests.accuracy.speed_baselines import SPEED_BASELINES

Predictor = Callable[[Run], Prediction | None]
_APART = 0.1


@dataclass(frozen=True, slots=True)
class Score:
    """How a predictor did on some runs."""

    name: str
    runs: int
    tpot: float  # mean absolute relative error
    tpot_bias: float
    ttft: float
    ttft_bias: float
    order: float  # share of pairs of a model, more than 10 % apart, in the right order
    pairs: int

    def line(self) -> str:
        return (
            f"  {self.name:<34} {self.runs:>4} {self.tpot_bias:>+8.1%} {self.tpot:>6.1%} "
            f"{self.ttft_bias:>+8.1%} {self.ttft:>6.1%} {self.order:>7.1%} of {self.pairs:,}"
        )


HEADER = f"  {'':<34} runs   TPOT: mean and   TTFT: the same  order of pairs\n{'':<43} mean absolute error"


@cache
def folds(prior_width: float = 1.0) -> tuple[Score, ...]:
    """Of each model and each GPU type: constants fitted to all other runs."""
    runs = kept(read_runs())
    scores = []
    for title, of in (("model", _model), ("GPU", _gpu)):
        for left_out in sorted({of(run) for run in runs}):
            others = [run for run in runs if of(run) != left_out]
            constants = fit(others, prior_width=prior_width)
            tested = [run for run in runs if of(run) == left_out]
            scores.append(score(f"{title} {left_out}", tested, by(constants)))
    return tuple(scores)


def by(constants: Constants) -> Predictor:
    """Our model with these constants."""
    return lambda run: run.predicted(constants)


def score(name: str, runs: Sequence[Run], predictor: Predictor) -> Score:
    """Of the runs for which the predictor has an answer."""
    answers = [(run, answer) for run in runs if (answer := predictor(run)) is not None]
    tpot = [answer.tpot_ms / run.tpot_ms - 1 for run, answer in answers]
    ttft = [answer.ttft_s / run.ttft_s - 1 for run, answer in answers]
    right, pairs = _ordered([(run, answer.tpot_ms) for run, answer in answers])
    return Score(
        name=name,
        runs=len(answers),
        tpot=mean(map(abs, tpot)),
        tpot_bias=mean(tpot),
        ttft=mean(map(abs, ttft)),
        ttft_bias=mean(ttft),
        order=right / max(pairs, 1),
        pairs=pairs,
    )


def speed_report() -> Iterator[str]:
    """Folds, groups, other formulas on the same runs, what was left out and why."""
    runs = read_runs()
    used = kept(runs)
    yield "\nspeed of runs that the constants were not fitted to (each line: fitted to all others)"
    yield HEADER
    yield from (each.line() for each in folds())
    for width in (0.5, 2.0):
        yield f"  the same with priors {width:g} times as wide"
        yield from (each.line() for each in folds(width))
    yield "\nall runs, constants as shipped (fitted to them), by group"
    for group in sorted({run.group for run in used}):
        members = [run for run in used if run.group == group]
        yield score(group, members, by(FITTED)).line()
    yield score("all", used, by(FITTED)).line()
    possible = [run for run in runs if not run.excluded or run.excluded.startswith("disturbed")]
    yield score("all, with disturbed runs", possible, by(FITTED)).line()
    as_told = [replace(run, load=run.told) for run in used]
    yield score("all, lengths as the table tells", as_told, by(FITTED)).line()
    yield "\nthe same runs by other formulas (approximations: see tests/accuracy/speed_baselines.py)"
    for name, predictor in SPEED_BASELINES.items():
        for model in sorted({run.model for run in used}):
            members = [run for run in used if run.model == model and predictor(run)]
            if members:
                yield score(f"{name} {model}", members, predictor).line()
        yield score(f"{name} all", used, predictor).line()
    yield from _left_out(runs)
    yield from _cached_prompts([run for run in runs if run.model == "llama-3.1-8b"])


def _cached_prompts(runs: Sequence[Run]) -> Iterator[str]:
    """That one share of cached prompts explains a group's speed, and none does not."""
    yield "  if a share of the prompts came from the prefix cache (on by default, not told):"
    for share in (0.0, 0.5, 0.7, 0.8, 0.9):
        assumed = [replace(run, load=replace(run.load, prefix_hit=share)) for run in runs]
        yield score(f"llama-3.1-8b, {share:.0%} cached", assumed, by(FITTED)).line()


def _left_out(runs: Sequence[Run]) -> Iterator[str]:
    yield f"\nruns left out: {sum(bool(run.excluded) for run in runs)} of {len(runs)}"
    for reason in sorted({run.excluded for run in runs if run.excluded}):
        members = [run for run in runs if run.excluded == reason]
        yield f"  {len(members)} runs: {reason}"
        yield f"    {'; '.join(f'{run.model} {run.label}' for run in members)}"


def _ordered(answers: Sequence[tuple[Run, float]]) -> tuple[int, int]:
    right = pairs = 0
    for index, (one, one_tpot) in enumerate(answers):
        for other, other_tpot in answers[index + 1 :]:
            apart = max(one.tpot_ms, other.tpot_ms) > (1 + _APART) * min(one.tpot_ms, other.tpot_ms)
            if one.model == other.model and apart:
                pairs += 1
                right += (one.tpot_ms > other.tpot_ms) == (one_tpot > other_tpot)
    return right, pairs


def _model(run: Run) -> str:
    return run.model


def _gpu(run: Run) -> str:
    return run.gpu
