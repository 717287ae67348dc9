"""Plans as pages for people, and what pages share."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from placement.errors import DoesNotFit
from placement.plan import Plan, Robustness, Variant

GIB = 2**30


def page_console(*, stderr: bool = False) -> Console:
    """A console whose tables are not cut off where nobody looks at a terminal of 80 columns."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=200)


def feasible(plan: Plan, console: Console) -> Plan:
    """`plan`, if all of it can run.

    Raises:
        DoesNotFit: it cannot; the page with the reasons was printed on `console`.
    """
    if plan.status == "infeasible":
        console.print(plan_page(plan))
        raise DoesNotFit("the fleet does not fit; nothing was changed. The reasons are above")
    return plan


def plan_page(plan: Plan) -> RenderableType:
    """Variants with shape, memory and place; then what is not possible and why."""
    parts: list[RenderableType] = [
        Text(
            f"fleet {plan.fleet}: {plan.status}, {plan.gpus_used} of {plan.gpus_total} GPUs, "
            f"{plan.cost_per_hour:.2f} {plan.currency}/h{_gap(plan)}"
        )
    ]
    if plan.variants:
        columns = ("model", "variant", "replicas", "GPUs", "weights/GPU", "KV tokens", "nodes")
        table = Table(*columns, "TTFT p95", "TPOT p95", "used", box=None)
        for variant in plan.variants:
            table.add_row(*_plan_row(variant))
        parts.append(table)
    parts += [Text(line) for line in derived_demands(plan)]
    if plan.unpriced:
        parts.append(Text(unpriced(plan), style="yellow"))
    if plan.node_loss is not None:
        parts.append(Text(plan.node_loss.in_words))
    if plan.robustness is not None and plan.robustness.short:
        parts.append(Text(_if_slower(plan, plan.robustness), style="yellow"))
    for unmet in plan.unmet:
        parts.append(Text(f"{unmet.model}: {unmet.constraint}", style="red"))
        parts.append(Text(f"  cheapest way out: {unmet.cheapest_relaxation}"))
    return Group(*parts)


def derived_demands(plan: Plan) -> list[str]:
    """A line for each model whose demand nobody wrote down in numbers."""
    return [
        f"{name} is planned for {demand.in_words}"
        for name, demand in sorted(plan.demands.items())
        if demand.source
    ]


def unpriced(plan: Plan) -> str:
    """Whose prices are a guess, and what to do about it."""
    return (
        f"nobody knows the price of {', '.join(plan.unpriced)}: counted as dear as the dearest GPU "
        "there is; give price_per_gpu_hour in the inventory"
    )


def _gap(plan: Plan) -> str:
    return f", at most {100 * plan.gap:.2f} % from the best" if plan.status == "feasible" else ""


def _if_slower(plan: Plan, robustness: Robustness) -> str:
    """What `robust: require` would avoid, and for how much."""
    told = f"with engines 15 % slower than predicted {', '.join(robustness.short)} would go short"
    if robustness.objective_to_hold is None:
        return told
    if plan.objective > 0 and robustness.objective_to_hold >= plan.cost_per_hour:
        dearer = robustness.objective_to_hold - plan.cost_per_hour
        return f"{told}; `robust: require` avoids that for {dearer:.2f} {plan.currency}/h"
    return f"{told}; `robust: require` avoids that"


def beside_gpus(variant: Variant) -> str:
    """What a replica of llama.cpp holds in host memory; on a CPU that is all, and told already."""
    if not variant.shape.host_memory_bytes or variant.gpu == "cpu":
        return ""
    return f" + {variant.shape.host_memory_bytes / GIB:.1f} GiB host"


def error_bar(relative: float | None) -> str:
    """What a prediction may be wrong by."""
    return "" if relative is None else f" ±{relative:.0%}"


def age(seconds: float) -> str:
    """`12 s`, `5 min`, `3 h`, `2 d`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def _plan_row(variant: Variant) -> tuple[str, ...]:
    shape = variant.shape
    nodes = sorted({node.node for replica in variant.placement for node in replica})
    return (
        variant.model,
        variant.variant,
        f"{variant.replicas} ({variant.bounds.min}-{variant.bounds.max})",
        variant.hardware,
        f"{shape.per_gpu.weights_bytes / GIB:.2f} GiB{beside_gpus(variant)}",
        f"{shape.kv_cache_tokens:,}",
        ", ".join(nodes),
        f"{variant.predicted.ttft_p95_s:.2f} s",
        f"{variant.predicted.tpot_p95_ms:.1f} ms",
        f"{100 * variant.predicted.utilization:.0f} %",
    )
