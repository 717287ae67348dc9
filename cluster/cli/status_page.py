"""What `bora status` prints: the fleet at a glance, then what deserves a look. Fits 100 columns."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.cli.render import GIB, age, error_bar
from cluster.messages import FleetStatus, RankPlace, ReplicaStatus, SpeedStatus, VariantStatus

MOST_REPLICAS = 24  # beyond that only those are listed that do not serve, unless all are asked for
_MOST_NODES = 3
_FAILURE_LINES = 6
_STYLES = {"ready": "green", "failed": "red", "unhealthy": "red"}


def status_page(
    status: FleetStatus, now_s: float | None = None, *, every_replica: bool = False
) -> RenderableType:
    """The fleet now: a line for each variant, then its replicas, adapters and what is not as wanted.

    `now_s`: epoch seconds.
    """
    now_s = time.time() if now_s is None else now_s
    parts: list[RenderableType] = [_head(status)]
    if status.variants:
        parts += [Text(), _variants(status.variants)]
    title, replicas = _replicas(status.variants, every_replica=every_replica)
    parts += [Text(), Text(title)] if title else []
    tables = (replicas, _adapters(status.variants), _speeds(status.variants))
    for table in (*tables, _last_events(status.variants, now_s)):
        parts += [Text(), table] if table.row_count else []
    remarks = [line for variant in status.variants for line in _remarks(variant)]
    failures = [line for variant in status.variants for line in _failures(variant)]
    if status.gateway_failure and not status.gateways:
        failures.append(f"gateway: {status.gateway_failure}")
    parts += [Text(line, style="yellow") for line in remarks]
    parts += [Text(line, style="red") for line in failures]
    return Group(*parts)


def _table(*columns: str, wraps: Sequence[str]) -> Table:
    """Columns that are not in `wraps` keep their words together."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column not in wraps, overflow="fold")
    return table


def _head(status: FleetStatus) -> Text:
    ready = sum(variant.ready for variant in status.variants)
    wanted = sum(variant.wanted for variant in status.variants)
    head = Text(
        f"fleet {status.fleet or '(none)'}: {ready}/{wanted} replicas ready, endpoint table "
        f"{status.table_version}, "
    )
    if status.gateways:
        return head.append(f"{len(status.gateways)} gateway(s)")
    return head.append("no gateway reports", style="red")


def _variants(variants: Sequence[VariantStatus]) -> Table:
    """With their roles, where some have one."""
    roles = ("role",) if any(variant.role != "whole" for variant in variants) else ()
    table = _table(
        "variant", *roles, "ready", "state", "GPUs", "GiB/GPU", "KV tokens", "flight+queue",
        wraps=("variant", "GPUs"),
    )  # fmt: skip
    for variant in variants:
        table.add_row(
            Text(variant.variant),
            *(variant.role for _ in roles),
            f"{variant.ready}/{variant.wanted}",
            _state(variant),
            Text(_where(variant)),
            _planned_and_actual(
                f"{variant.planned_weights_bytes / GIB:.3g}",
                [f"{w / GIB:.3g}" for each in variant.replicas if (w := each.weights_bytes)],
            ),
            _planned_and_actual(
                _count(variant.planned_kv_cache_tokens),
                [_count(t) for each in variant.replicas if (t := each.kv_cache_tokens)],
            ),
            f"{variant.in_flight:.1f}+{variant.queued}",
        )
    return table


def _planned_and_actual(planned: str, actual: Sequence[str]) -> str:
    """`23/24`. Actual is what most replicas have."""
    found = Counter(actual).most_common(1)
    return f"{planned}/{found[0][0] if found else '?'}"


def _count(tokens: int) -> str:
    """`950`, `122k`, `1.25M`."""
    if tokens < 10_000:
        return f"{tokens:,}"
    return f"{tokens / 1e6:.2f}M" if tokens >= 10**6 else f"{tokens / 1e3:.0f}k"


def _where(variant: VariantStatus) -> str:
    """GPUs that it holds, and their nodes."""
    nodes: Counter[str] = Counter()
    for replica in variant.replicas:
        places = _places(replica)
        for place in places:
            share = variant.gpus_per_replica // len(places)
            nodes[place.node] += len(place.gpus) or share
    if not nodes:
        return variant.gpu
    held = f"{sum(nodes.values())} x {variant.gpu}"
    if len(nodes) > _MOST_NODES:
        return f"{held}, {len(nodes)} nodes"
    return f"{held}: " + ", ".join(f"{node} ({count})" for node, count in sorted(nodes.items()))


def _places(replica: ReplicaStatus) -> list[ReplicaStatus | RankPlace]:
    """Of its ranks, as far as they have one."""
    ranks: list[ReplicaStatus | RankPlace] = [replica, *replica.followers]
    return [each for each in ranks if each.node]


def _replicas(variants: Sequence[VariantStatus], *, every_replica: bool) -> tuple[str, Table]:
    """All of few; of many those that do not serve. The title says so."""
    table = _table(
        "replica", "of", "age", "state", "node and GPUs", "weights GiB", "KV tokens", "running",
        "waiting", wraps=("of", "state", "node and GPUs"),
    )  # fmt: skip
    total = sum(len(variant.replicas) for variant in variants)
    all_ = every_replica or total <= MOST_REPLICAS
    for variant in variants:
        for replica in variant.replicas:
            if all_ or replica.state != "ready":
                table.add_row(*_replica_row(variant, replica))
    if all_:
        return "", table
    some = f"{table.row_count} of {total} replicas do not serve" if table.row_count else "all serve"
    return f"{some}; `bora status MODEL` shows all of a model, --replicas of all models", table


def _replica_row(variant: VariantStatus, replica: ReplicaStatus) -> tuple[RenderableType, ...]:
    tokens = "?" if replica.kv_cache_tokens is None else f"{replica.kv_cache_tokens:,}"
    weights = "?" if replica.weights_bytes is None else f"{replica.weights_bytes / GIB:.3f}"
    stage = f" ({replica.stage})" if replica.stage else ""
    places = [
        each.node + (f" GPU {','.join(map(str, each.gpus))}" if each.gpus else "")
        for each in _places(replica)
    ]
    return (
        Text(replica.replica),
        Text(variant.model),
        age(replica.age_s),
        Text(f"{replica.state}{stage}{_balance(replica)}", _STYLES.get(replica.state, "yellow")),
        Text(" + ".join(places)),
        weights,
        tokens,
        str(replica.running),
        str(replica.waiting),
    )


def _balance(replica: ReplicaStatus) -> str:
    if replica.expert_balance is None:
        return ""
    return f", experts {100 * replica.expert_balance:.0f} % balanced"


def _adapters(variants: Iterable[VariantStatus]) -> Table:
    table = _table("adapter", "loaded", "state", "source", wraps=("adapter", "state", "source"))
    for variant in variants:
        for name, source in variant.adapters.items():
            table.add_row(*_adapter_row(variant, name, source))
    return table


def _adapter_row(variant: VariantStatus, name: str, source: str) -> tuple[RenderableType, ...]:
    """On how many of the replicas that serve it is loaded; where not, why."""
    serving = [each for each in variant.replicas if each.state == "ready"]
    loaded = sum(name in each.adapters for each in serving)
    whys = [each.adapter_failures[name] for each in serving if name in each.adapter_failures]
    stages = [f"{stage} on {each.node}" for each in variant.replicas
              if (stage := each.adapter_stages.get(name))]  # fmt: skip
    state = Text("loaded", style="green")
    if stages:
        state = Text(stages[0], style="yellow")
    elif whys:
        state = Text(f"not loaded: {whys[0]}", style="red")
    elif loaded < len(serving) or not serving:
        state = Text("loading", style="yellow")
    return (Text(f"{name} of {variant.model}"), f"{loaded}/{len(serving)}", state, Text(source))


def _speeds(variants: Iterable[VariantStatus]) -> Table:
    """Planned and actual, of those that were compared or told why not."""
    table = _table("variant", "speed plan / actual", wraps=("variant", "speed plan / actual"))
    for variant in variants:
        if variant.speed is not None:
            table.add_row(Text(variant.variant), Text(_speed(variant.speed)))
    return table


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


def _last_events(variants: Iterable[VariantStatus], now_s: float) -> Table:
    table = _table("model", "ago", "last event", wraps=("model", "last event"))
    told: set[str] = set()
    for variant in variants:
        if variant.last_event and variant.model not in told:
            told.add(variant.model)
            ago = age(now_s - variant.last_event_s)
            table.add_row(Text(variant.model), ago, Text(variant.last_event))
    return table


def _state(variant: VariantStatus) -> Text:
    if variant.ready > variant.wanted == 0:
        return Text("being replaced", style="yellow")
    if variant.ready >= variant.wanted:
        return Text("serving" if variant.wanted else "scaled to zero", style="green")
    if variant.ready or variant.failure:
        return Text("degraded", style="yellow")
    return Text("starting", style="yellow")


def _remarks(variant: VariantStatus) -> list[str]:
    """What is under way or not as planned."""
    remarks = [f"not as planned: {text}" for text in variant.misplaced]
    remarks += [variant.waiting] if variant.waiting else []
    remarks += [f"roll-out: {variant.rollout}"] if variant.rollout else []
    return [f"{variant.model}: {text}" for text in remarks]


def _failures(variant: VariantStatus) -> list[str]:
    if not variant.failure or variant.ready >= variant.wanted:
        return []
    end = "\n".join(variant.failure.splitlines()[-_FAILURE_LINES:])
    return [f"{variant.model}: an engine ended (`bora logs {variant.model}`):\n{end}"]
