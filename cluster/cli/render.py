"""Plans and states as pages for people."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.messages import FleetStatus, ReplicaStatus, VariantStatus
from placement.errors import DoesNotFit
from placement.plan import Plan, Variant

GIB = 2**30
FAILURE_LINES = 6
_STYLES = {"ready": "green", "failed": "red", "unhealthy": "red"}


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
            f"{plan.cost_per_hour:.2f} {plan.currency}/h"
        )
    ]
    if plan.variants:
        columns = ("model", "variant", "replicas", "GPUs", "weights/GPU", "KV tokens", "nodes")
        table = Table(*columns, "TTFT", "TPOT", box=None)
        for variant in plan.variants:
            table.add_row(*_plan_row(variant))
        parts.append(table)
    for unmet in plan.unmet:
        parts.append(Text(f"{unmet.model}: {unmet.constraint}", style="red"))
        parts.append(Text(f"  cheapest way out: {unmet.cheapest_relaxation}"))
    return Group(*parts)


def status_page(status: FleetStatus) -> RenderableType:
    """The fleet now: each variant, and under it its replicas."""
    table = Table(
        "model", "variant", "ready", "state", "load", "KV tokens plan/actual", "node", "last event",
        box=None,
    )  # fmt: skip
    failures: list[RenderableType] = []
    for variant in status.variants:
        load = f"{variant.in_flight:.1f} in flight, {variant.queued} waiting"
        ready = f"{variant.ready}/{variant.wanted}"
        table.add_row(
            variant.model, variant.variant, ready, _state(variant), load,
            "", "", "", variant.last_event,
        )  # fmt: skip
        for replica in variant.replicas:
            table.add_row(*_replica_row(variant, replica))
        failures += [Text(line, style="yellow") for line in _remarks(variant)]
        if variant.failure and variant.ready < variant.wanted:
            end = "\n".join(variant.failure.splitlines()[-FAILURE_LINES:])
            text = f"{variant.model}: an engine ended (`bora logs {variant.model}`):\n{end}"
            failures.append(Text(text, style="red"))
    head = Text(f"fleet {status.fleet or '(none)'}, endpoint table {status.table_version}, ")
    if status.gateways:
        head.append(f"{len(status.gateways)} gateway(s)")
    else:
        head.append("no gateway reports", style="red")
        if status.gateway_failure:
            failures.append(Text(f"gateway: {status.gateway_failure}", style="red"))
    return Group(head, table, *failures)


def _remarks(variant: VariantStatus) -> list[str]:
    """What is under way or not as planned."""
    remarks = [f"not as planned: {text}" for text in variant.misplaced]
    remarks += [variant.waiting] if variant.waiting else []
    remarks += [f"roll-out: {variant.rollout}"] if variant.rollout else []
    return [f"{variant.model}: {text}" for text in remarks]


def _plan_row(variant: Variant) -> tuple[str, ...]:
    shape = variant.shape
    nodes = sorted({node.node for replica in variant.placement for node in replica})
    return (
        variant.model,
        variant.variant,
        f"{variant.replicas} ({variant.bounds.min}-{variant.bounds.max})",
        f"{shape.num_gpus} x {variant.gpu}",
        f"{shape.per_gpu.weights_bytes / GIB:.2f} GiB",
        f"{shape.kv_cache_tokens:,}",
        ", ".join(nodes),
        f"{shape.prediction.ttft_s:.3f} s",
        f"{shape.prediction.tpot_ms:.1f} ms",
    )


def _replica_row(variant: VariantStatus, replica: ReplicaStatus) -> tuple[RenderableType, ...]:
    tokens = "?" if replica.kv_cache_tokens is None else f"{replica.kv_cache_tokens:,}"
    weights = "?" if replica.weights_bytes is None else f"{replica.weights_bytes / GIB:.3f}"
    stage = f" ({replica.stage})" if replica.stage else ""
    return (
        "",
        Text(f"  {replica.replica}"),
        f"{replica.age_s:.0f} s",
        Text(f"{replica.state}{stage}", style=_STYLES.get(replica.state, "yellow")),
        f"{replica.running} running, {replica.waiting} waiting",
        f"{variant.planned_weights_bytes / GIB:.3f} / {weights}",
        f"{variant.planned_kv_cache_tokens:,} / {tokens}",
        replica.node,
        "",
    )


def _state(variant: VariantStatus) -> Text:
    if variant.ready > variant.wanted == 0:
        return Text("being replaced", style="yellow")
    if variant.ready >= variant.wanted:
        return Text("serving" if variant.wanted else "scaled to zero", style="green")
    if variant.ready or variant.failure:
        return Text("degraded", style="yellow")
    return Text("starting", style="yellow")
