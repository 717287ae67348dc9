"""Tables of predicted and measured, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from tests.accuracy.baselines import BASELINES
from tests.accuracy.judge import OURS_BY_DEFAULT, QUANTITIES, Judged

_NAME = 46


def report(judged: Sequence[Judged]) -> Iterator[str]:
    """All lines: each row, the distribution of errors, other calculators, what was left out."""
    for quantity in QUANTITIES:
        rows = [each for each in judged if each.quantity == quantity]
        if rows:
            yield from _rows(quantity, rows)
    yield from _distribution(judged)
    yield from _others(judged)
    yield from _excluded(judged)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _rows(quantity: str, rows: Sequence[Judged]) -> Iterator[str]:
    yield f"\n{quantity}: row of measurements.csv, measured, predicted, error"
    for each in rows:
        row = each.row
        numbers = f"{_short(each.measured):>15} {_short(each.predicted):>15} {each.error:>+8.2%}"
        loose = f"  ({each.loose})" if each.loose else ""
        yield f"  {row.line:>4} {row.label[:_NAME]:<{_NAME}} {numbers}{loose}"


def _distribution(judged: Sequence[Judged]) -> Iterator[str]:
    yield "\nerrors: quantity, rows, median, 90 %, largest"
    for quantity in QUANTITIES:
        errors = [abs(each.error) for each in judged if each.quantity == quantity]
        if errors:
            yield f"  {quantity:<12} {len(errors):>4} {_spread(errors)}"


def _others(judged: Sequence[Judged]) -> Iterator[str]:
    caches = [each for each in judged if each.quantity == "KV cache" and each.others]
    fits = [each for each in judged if each.quantity == "fits"]
    yield f"\nthe same {len(caches)} KV caches and {len(fits)} verdicts by other calculators: "
    yield "  calculator       median     90 %  largest  within 3 %   verdicts right"
    ours = [abs(each.error) for each in caches]
    right = sum(each.error == 0 for each in fits)
    yield f"  {'ours':<14} {_spread(ours)} {_within(ours):>9}   {right} of {len(fits)}"
    for name in (OURS_BY_DEFAULT, *BASELINES):
        errors = [abs(each.others[name] / each.measured - 1) for each in caches]
        known = [each for each in fits if name in each.others]
        right = sum(each.others[name] == each.measured for each in known)
        verdicts = f"{right} of {len(known)}" if known else "as ours"
        yield f"  {name:<14} {_spread(errors)} {_within(errors):>9}   {verdicts}"


def _excluded(judged: Sequence[Judged]) -> Iterator[str]:
    reasons: dict[str, list[Judged]] = {}
    for each in judged:
        if each.excluded:
            reasons.setdefault(each.excluded, []).append(each)
    yield f"\nleft out: {sum(map(len, reasons.values()))} rows of {len(judged)}"
    for reason, rows in reasons.items():
        yield f"  {reason}:"
        for each in rows:
            row = each.row
            yield f"    {row.line:>4} {row.label[:_NAME]:<{_NAME}} {row.value:g} {row.unit}"


def _spread(errors: Sequence[float]) -> str:
    return f"{median(errors):>8.2%} {quantile(errors, 0.9):>8.2%} {max(errors):>8.2%}"


def _within(errors: Sequence[float]) -> str:
    return f"{sum(error <= 0.03 for error in errors)}/{len(errors)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.2f}"
