"""Explanations of a plan, and changes between plans, as pages for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from placement.explanation import Explanation, Reason
from placement.migration import Change, Create, Delete, Migration, ModelChange, Replace

_GB = 1e9
_STYLES = {"create": "green", "resize": "cyan", "replace": "yellow", "delete": "red"}


def explanation_page(explanation: Explanation, currency: str) -> RenderableType:
    """Why each model runs as it does; what would change the plan; ways out."""
    parts: list[RenderableType] = []
    for reason in explanation.reasons:
        parts += [Text(), Text(reason.model, style="bold")]
        parts += [Text(f"  chosen     {chosen}") for chosen in reason.chosen]
        parts.append(Text(f"  runner-up  {_runner_up(reason, currency)}"))
        parts.append(Text(f"  limit      {reason.binding}"))
        if reason.roles is not None:
            parts.append(Text(f"  roles      {reason.roles}"))
    if explanation.what_if:
        parts += [Text(), Text("what if", style="bold")]
        parts += [Text(f"  {each.change}: {each.effect}") for each in explanation.what_if]
    if explanation.ways_out:
        parts += [Text(), Text("ways out, each enough alone", style="bold")]
        parts += [
            Text(f"  {way.change}: then {way.cost_per_hour:.2f} {currency}/h")
            for way in explanation.ways_out
        ]
    return Group(*parts)


def migration_page(moved: Migration) -> RenderableType:
    """The changes in order; each model before and after."""
    cost = moved.cost_per_hour_after - moved.cost_per_hour_before
    head = (
        f"{len(moved.changes)} changes, {moved.bytes_to_load / _GB:.1f} GB to load, about "
        f"{moved.duration_s:.0f} s, reduced capacity for {moved.reduced_capacity_s:.0f} s, "
        f"{cost:+.2f} {moved.currency}/h"
    )
    adapters = [Text(line) for model in moved.models for line in _adapters_of(model)]
    if not moved.changes:
        return Group(*adapters) if adapters else Text("nothing would change")
    table = Table("", "model", "variant", "replicas", "GB", "serves after", "", box=None)
    for change in moved.changes:
        table.add_row(*_change_row(change))
    models = Table("model", "replicas", "requests/s", "TTFT p95", "TPOT p95", "cost/h", box=None)
    for model in moved.models:
        models.add_row(*_model_row(model))
    return Group(Text(head), table, *adapters, Text(), models)


def _runner_up(reason: Reason, currency: str) -> str:
    if reason.runner_up is None:
        return "nothing else would do" if reason.chosen else "-"
    costs = reason.runner_up_costs or 0.0
    return f"{reason.runner_up}: {costs:+.2f} {currency}/h"


def _change_row(change: Change) -> tuple[RenderableType, ...]:
    return (
        Text(change.kind, style=_STYLES[change.kind]),
        change.model,
        change.variant,
        _replicas(change),
        f"{change.bytes_to_load / _GB:.1f}" if change.bytes_to_load else "",
        f"{change.load_s:.0f} s" if change.load_s else "",
        _remark(change),
    )


def _replicas(change: Change) -> str:
    if isinstance(change, Create):
        return f"+{change.replicas}"
    if isinstance(change, Delete):
        return f"-{change.replicas}"
    if isinstance(change, Replace):
        return str(change.replicas)
    return f"{change.before} -> {change.after}"


def _remark(change: Change) -> str:
    told = [change.why] if isinstance(change, Replace) else []
    if change.reduced_capacity_s:
        told.append(f"reduced capacity for {change.reduced_capacity_s:.0f} s")
    return ", ".join(told)


def _model_row(model: ModelChange) -> tuple[str, ...]:
    return (
        model.model,
        _arrow(model.replicas_before, model.replicas_after, str),
        _arrow(model.requests_per_s_before, model.requests_per_s_after, "{:.3g}".format),
        _arrow(model.ttft_p95_s_before, model.ttft_p95_s_after, "{:.2f} s".format),
        _arrow(model.tpot_p95_ms_before, model.tpot_p95_ms_after, "{:.1f} ms".format),
        _arrow(model.cost_per_hour_before, model.cost_per_hour_after, "{:.2f}".format),
    )


def _adapters_of(model: ModelChange) -> Iterator[str]:
    """What becomes of a model's adapters; engines run on."""
    before, after = model.adapters_before, model.adapters_after
    for name in {**before, **after}:
        if name not in after:
            yield f"{model.model}: adapter {name} is unloaded"
        elif name not in before:
            yield f"{model.model}: adapter {name} is loaded from {after[name]}"
        elif before[name] != after[name]:
            yield f"{model.model}: adapter {name} is loaded from {after[name]} instead"


def _arrow(before: float | None, after: float | None, told: Callable[[float], str]) -> str:
    old, new = ("-" if value is None else told(value) for value in (before, after))
    return old if old == new else f"{old} -> {new}"
