"""Plans and states as pages for people."""

from __future__ import annotations

import time
from collections import Counter

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.messages import FleetStatus, ReplicaStatus, SpeedStatus, VariantStatus
from placement.errors import DoesNotFit
from placement.plan import Plan, Robustness, Variant

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
            f"{plan.cost_per_hour:.2f} {plan.currency}/h{_gap(plan)}"
        )
    ]
    if plan.variants:
        columns = ("model", "variant", "replicas", "GPUs", "weights/GPU", "KV tokens", "nodes")
        table = Table(*columns, "TTFT p95", "TPOT p95", "used", box=None)
        for variant in plan.variants:
            table.add_row(*_plan_row(variant))
        parts.append(table)
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


def status_page(status: FleetStatus, now_s: float | None = None) -> RenderableType:
    """The fleet now: each variant, and under it its replicas. `now_s`: epoch seconds."""
    now_s = time.time() if now_s is None else now_s
    roles = ("role",) if any(variant.role != "whole" for variant in status.variants) else ()
    table = Table(
        "model", "variant", *roles, "ready", "state", "nodes and GPUs",
        "weights/GPU plan/actual", "KV tokens plan/actual", "load", "speed plan/actual",
        "last event",
        box=None,
    )  # fmt: skip

    def add(row: tuple[RenderableType, ...], role: str = "") -> None:
        table.add_row(*row[:2], *(role for _ in roles), *row[2:])

    failures: list[RenderableType] = []
    for variant in status.variants:
        add(_variant_row(variant, now_s), variant.role)
        for replica in variant.replicas:
            add(_replica_row(variant, replica))
        for name, source in variant.adapters.items():
            add(_adapter_row(variant, name, source))
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


def _variant_row(variant: VariantStatus, now_s: float) -> tuple[RenderableType, ...]:
    hosts = Counter(replica.node for replica in variant.replicas if replica.node)
    places = ", ".join(
        f"{host} ({count * variant.gpus_per_replica})" for host, count in sorted(hosts.items())
    )
    last = ""
    if variant.last_event:
        last = f"{variant.last_event}, {age(now_s - variant.last_event_s)} ago"
    return (
        variant.model,
        variant.variant,
        f"{variant.ready}/{variant.wanted}",
        _state(variant),
        Text(f"{variant.gpu}: {places}" if places else variant.gpu),
        "",
        "",
        f"{variant.in_flight:.1f} in flight, {variant.queued} waiting",
        Text("" if variant.speed is None else _speed(variant.speed)),
        Text(last),
    )


def _speed(speed: SpeedStatus) -> str:
    """For the load of the newest window that counted."""
    last = speed.last
    if last is None:
        return f"not compared: {speed.not_counted}"
    return (
        f"TPOT {last.predicted_tpot_ms:.3g}{error_bar(last.tpot_error)} / "
        f"{last.observed_tpot_ms:.3g} ms, TTFT {last.predicted_ttft_s:.2g}"
        f"{error_bar(last.ttft_error)} / {last.observed_ttft_s:.2g} s"
    )


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
        variant.hardware,
        f"{shape.per_gpu.weights_bytes / GIB:.2f} GiB{beside_gpus(variant)}",
        f"{shape.kv_cache_tokens:,}",
        ", ".join(nodes),
        f"{variant.predicted.ttft_p95_s:.2f} s",
        f"{variant.predicted.tpot_p95_ms:.1f} ms",
        f"{100 * variant.predicted.utilization:.0f} %",
    )


def _replica_row(variant: VariantStatus, replica: ReplicaStatus) -> tuple[RenderableType, ...]:
    tokens = "?" if replica.kv_cache_tokens is None else f"{replica.kv_cache_tokens:,}"
    weights = "?" if replica.weights_bytes is None else f"{replica.weights_bytes / GIB:.3f}"
    stage = f" ({replica.stage})" if replica.stage else ""
    ranks = [(replica.node, replica.gpus)]
    ranks += [(follower.node, follower.gpus) for follower in replica.followers]
    places = [node + (f" GPU {','.join(map(str, gpus))}" if gpus else "") for node, gpus in ranks]
    return (
        "",
        Text(f"  {replica.replica}"),
        age(replica.age_s),
        Text(f"{replica.state}{stage}", style=_STYLES.get(replica.state, "yellow")),
        Text(" + ".join(places)),
        f"{variant.planned_weights_bytes / GIB:.3f} / {weights}",
        f"{variant.planned_kv_cache_tokens:,} / {tokens}",
        f"{replica.running} running, {replica.waiting} waiting{_balance(replica)}",
        "",
        "",
    )


def _balance(replica: ReplicaStatus) -> str:
    if replica.expert_balance is None:
        return ""
    return f", experts {100 * replica.expert_balance:.0f} % balanced"


def _adapter_row(variant: VariantStatus, name: str, source: str) -> tuple[RenderableType, ...]:
    """An adapter: on how many of the replicas that serve it is loaded; where not, why."""
    serving = [each for each in variant.replicas if each.state == "ready"]
    loaded = sum(name in each.adapters for each in serving)
    whys = [each.adapter_failures[name] for each in serving if name in each.adapter_failures]
    state = Text("loaded", style="green")
    if whys:
        state = Text(f"not loaded: {whys[0]}", style="red")
    elif loaded < len(serving) or not serving:
        state = Text("loading", style="yellow")
    return ("", Text(f"  adapter {name}"), f"{loaded}/{len(serving)}", state, Text(source))


def _state(variant: VariantStatus) -> Text:
    if variant.ready > variant.wanted == 0:
        return Text("being replaced", style="yellow")
    if variant.ready >= variant.wanted:
        return Text("serving" if variant.wanted else "scaled to zero", style="green")
    if variant.ready or variant.failure:
        return Text("degraded", style="yellow")
    return Text("starting", style="yellow")
