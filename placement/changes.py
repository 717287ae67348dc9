"""From the plan that runs to the one that is wanted: what to create, resize, replace and delete.

Replica by replica: what finds its GPUs free starts first (surge), then goes what its model can
spare; where neither is possible, the replica goes whose loss costs its model the smallest share, and
the time until its place is taken is told as reduced capacity.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from placement.loading import load_bytes, variant_load_s
from placement.migration import Change, Create, Delete, Migration, ModelChange, Replace, Resize
from placement.plan import NodeGpus, Plan, Variant

Gpu = tuple[str, int]
_ENOUGH = 1 - 1e-6  # of a promise
_NOTHING = 1e-9  # requests/s


@dataclass(frozen=True, slots=True, eq=False)
class _Replica:
    variant: Variant
    engine: str
    gpus: frozenset[Gpu]

    @property
    def rate(self) -> float:
        return self.variant.capacity_requests_per_s


@dataclass(frozen=True, slots=True)
class _Step:
    """One replica starts, or stops."""

    replica: _Replica
    starts: bool


@dataclass(slots=True)
class _Fleet:
    """What runs, while steps are taken."""

    taken: set[Gpu] = field(default_factory=set)
    rates: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: list[_Step] = field(default_factory=list)

    def start(self, replica: _Replica) -> None:
        """It takes its GPUs and carries its rate."""
        self.taken |= replica.gpus
        self.rates[replica.variant.model] += replica.rate
        self.steps.append(_Step(replica, starts=True))

    def stop(self, replica: _Replica) -> None:
        """Its GPUs are free."""
        self.taken -= replica.gpus
        self.rates[replica.variant.model] -= replica.rate
        self.steps.append(_Step(replica, starts=False))


def changes(running: Plan, wanted: Plan) -> tuple[Change, ...]:
    """What to do, in an order in which no model carries less than promised if that can be had.

    Promised is the demand of the wanted plan, as far as the running one carries it; a model without
    a demand keeps one replica. Each change is done before the next begins.
    """
    return tuple(_grouped(_steps(running, wanted), running, wanted))


def migration(running: Plan, wanted: Plan) -> Migration:
    """The changes, with what they load and cost, and each model before and after."""
    done = changes(running, wanted)
    return Migration(
        fleet=wanted.fleet,
        status=wanted.status,
        changes=done,
        bytes_to_load=sum(change.bytes_to_load for change in done),
        duration_s=sum(change.load_s for change in done),
        reduced_capacity_s=sum(change.reduced_capacity_s for change in done),
        cost_per_hour_before=running.cost_per_hour,
        cost_per_hour_after=wanted.cost_per_hour,
        currency=wanted.currency,
        models=tuple(
            _model_change(name, running, wanted)
            for name in sorted({v.model for v in (*running.variants, *wanted.variants)})
        ),
    )


def _steps(running: Plan, wanted: Plan) -> list[_Step]:
    old, new = _replicas(running), _replicas(wanted)
    staying = {(each.engine, each.gpus) for each in old} & {(r.engine, r.gpus) for r in new}
    going = [each for each in old if (each.engine, each.gpus) not in staying]
    coming = [each for each in new if (each.engine, each.gpus) not in staying]
    fleet = _Fleet()
    for replica in old:
        fleet.taken |= replica.gpus
        fleet.rates[replica.variant.model] += replica.rate
    promised = _promised(running, wanted)
    coming.sort(key=lambda each: (-len(each.gpus), each.variant.variant))
    while coming:
        before = len(fleet.steps)
        coming = _start_what_fits(fleet, coming)
        going = _stop_what_can_be_spared(fleet, going, promised)
        if coming and len(fleet.steps) == before:
            coming, going = _give_way(fleet, coming, going, promised)
    for replica in going:
        fleet.stop(replica)
    return fleet.steps


def _start_what_fits(fleet: _Fleet, coming: Sequence[_Replica]) -> list[_Replica]:
    """Those that still wait."""
    waiting = []
    for replica in coming:
        if replica.gpus & fleet.taken:
            waiting.append(replica)
        else:
            fleet.start(replica)
    return waiting


def _stop_what_can_be_spared(
    fleet: _Fleet, going: Sequence[_Replica], promised: dict[str, float]
) -> list[_Replica]:
    """Those that are still needed."""
    needed = []
    for replica in going:
        model = replica.variant.model
        if _keeps(fleet.rates[model] - replica.rate, promised.get(model, 0.0)):
            fleet.stop(replica)
        else:
            needed.append(replica)
    return needed


def _keeps(rate: float, promised: float) -> bool:
    """Whether a promise is kept; rates that were added and taken away leave a little below 0."""
    return rate >= promised * _ENOUGH - _NOTHING


def _give_way(
    fleet: _Fleet,
    coming: Sequence[_Replica],
    going: Sequence[_Replica],
    promised: dict[str, float],
) -> tuple[list[_Replica], list[_Replica]]:
    """Stop the replicas that one coming replica waits for: those whose loss weighs least."""
    by_gpu = {gpu: replica for replica in going for gpu in replica.gpus}

    def in_the_way(replica: _Replica) -> list[_Replica]:
        return list(dict.fromkeys(by_gpu[gpu] for gpu in sorted(replica.gpus) if gpu in by_gpu))

    def loss(replica: _Replica) -> float:
        return sum(
            each.rate / max(promised.get(each.variant.model, 0.0), 1e-9)
            for each in in_the_way(replica)
        )

    first = min(coming, key=lambda each: (loss(each), each.variant.variant, sorted(each.gpus)))
    stopped = in_the_way(first)
    for replica in stopped:
        fleet.stop(replica)
    fleet.taken -= first.gpus  # should they be taken by nobody that the running plan knows
    fleet.start(first)
    left = [each for each in going if each not in stopped]
    return [each for each in coming if each is not first], left


def _promised(running: Plan, wanted: Plan) -> dict[str, float]:
    """Requests/s for each model that must not be undercut on the way."""
    found = {}
    for model in {variant.model for variant in wanted.variants}:
        before, after = _rate(running, model), _rate(wanted, model)
        mine = [variant for variant in wanted.variants if variant.model == model]
        demand = max(variant.predicted.utilization for variant in mine) * after
        smallest = min(
            (
                v.capacity_requests_per_s
                for v in running.variants
                if v.model == model and v.replicas
            ),
            default=0.0,
        )
        least = smallest if any(variant.replicas for variant in mine) else 0.0
        found[model] = min(before, after, max(demand, least))
    return found


def _grouped(steps: Sequence[_Step], running: Plan, wanted: Plan) -> Iterable[Change]:
    """Steps that follow each other and are of one variant, as one change."""
    before = {variant.variant: variant for variant in running.variants}
    after = {variant.variant: variant for variant in wanted.variants}
    count = {name: variant.replicas for name, variant in before.items()}
    groups = [
        list(group)
        for _, group in itertools.groupby(steps, key=lambda step: step.replica.variant.variant)
    ]
    reduced = _reduced_s(groups, running, wanted)
    for mine, reduced_s in zip(groups, reduced, strict=True):
        name = mine[0].replica.variant.variant
        starts, stops = sum(step.starts for step in mine), sum(not step.starts for step in mine)
        was = count.get(name, 0)
        count[name] = was + starts - stops
        yield _change(
            mine, before.get(name), after.get(name), was=was, now=count[name], reduced_s=reduced_s
        )


def _waves(group: Sequence[_Step]) -> Iterator[list[_Step]]:
    """Steps that are taken at once: replicas that start together, or stop together."""
    for _, wave in itertools.groupby(group, key=lambda step: step.starts):
        yield list(wave)


def _reduced_s(groups: Sequence[Sequence[_Step]], running: Plan, wanted: Plan) -> list[float]:
    """For how long the stops of each group leave their model below its promise.

    Until enough replicas serve that start later, in whatever group, one wave after the other.
    """
    promised = _promised(running, wanted)
    rates = {model: _rate(running, model) for model in {v.model for v in running.variants}}
    now, seconds = 0.0, [0.0] * len(groups)
    short: dict[str, tuple[float, int]] = {}  # since when, and because of which group
    for index, group in enumerate(groups):
        model = group[0].replica.variant.model
        for wave in _waves(group):
            carried = sum(step.replica.rate for step in wave)
            if wave[0].starts:
                now += variant_load_s(wave[0].replica.variant)
            rates[model] = rates.get(model, 0.0) + (carried if wave[0].starts else -carried)
            if not _keeps(rates[model], promised.get(model, 0.0)):
                short.setdefault(model, (now, index))
            elif model in short:
                since, at = short.pop(model)
                seconds[at] += now - since
    for since, at in short.values():
        seconds[at] += now - since
    return seconds


def _change(
    steps: Sequence[_Step],
    before: Variant | None,
    after: Variant | None,
    *,
    was: int,
    now: int,
    reduced_s: float,
) -> Change:
    starts = [step for step in steps if step.starts]
    stops = [step for step in steps if not step.starts]
    variant = steps[0].replica.variant
    waves = sum(wave[0].starts for wave in _waves(steps))
    told = {
        "model": variant.model,
        "variant": variant.variant,
        "pool": variant.pool,
        "bytes_to_load": len(starts) * load_bytes(after) if after is not None else 0,
        "load_s": waves * variant_load_s(after) if after is not None else 0.0,
        "reduced_capacity_s": reduced_s,
        "cost_per_hour": _price(after or variant, starts) - _price(before or variant, stops),
    }
    if after is None:
        return Delete(replicas=len(stops), **told)
    if before is None:
        return Create(replicas=len(starts), **told)
    if (starts and stops) or _engine(before) != _engine(after):
        return Replace(replicas=max(len(starts), len(stops)), why=_why(before, after), **told)
    return Resize(before=was, after=now, **told)


def _price(variant: Variant, steps: Sequence[_Step]) -> float:
    return len(steps) * variant.price_per_hour / variant.replicas if variant.replicas else 0.0


def _why(before: Variant, after: Variant) -> str:
    """What differs, in the words of the plan."""
    if before.checkpoint != after.checkpoint:
        return f"checkpoint {before.checkpoint} -> {after.checkpoint}"
    if before.commit != after.commit:
        return f"commit {before.commit[:12] or '?'} -> {after.commit[:12] or '?'}"
    old, new = before.shape.model_dump(), after.shape.model_dump()
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    layers = ("layer_partition", "gpu_layers")
    for name in ("engine", "precision", *names, "kv_cache_dtype", "dtype", *sizes, *layers):
        if old[name] != new[name]:
            return f"{name} {old[name]} -> {new[name]}"
    if _engine(before) != _engine(after):
        return "other engine flags"
    return "other GPUs, to make room"


def _model_change(name: str, running: Plan, wanted: Plan) -> ModelChange:
    old = [variant for variant in running.variants if variant.model == name and variant.replicas]
    new = [variant for variant in wanted.variants if variant.model == name and variant.replicas]
    return ModelChange(
        model=name,
        replicas_before=sum(variant.replicas for variant in old),
        replicas_after=sum(variant.replicas for variant in new),
        requests_per_s_before=_rate(running, name),
        requests_per_s_after=_rate(wanted, name),
        ttft_p95_s_before=max((v.predicted.ttft_p95_s for v in old), default=None),
        ttft_p95_s_after=max((v.predicted.ttft_p95_s for v in new), default=None),
        tpot_p95_ms_before=max((v.predicted.tpot_p95_ms for v in old), default=None),
        tpot_p95_ms_after=max((v.predicted.tpot_p95_ms for v in new), default=None),
        cost_per_hour_before=sum(variant.price_per_hour for variant in old),
        cost_per_hour_after=sum(variant.price_per_hour for variant in new),
        adapters_before=_adapters(running, name),
        adapters_after=_adapters(wanted, name),
    )


def _adapters(plan: Plan, model: str) -> dict[str, str]:
    mine = [variant.adapters for variant in plan.variants if variant.model == model]
    return {name: source for adapters in mine for name, source in adapters.items()}


def _rate(plan: Plan, model: str) -> float:
    return sum(v.replicas * v.capacity_requests_per_s for v in plan.variants if v.model == model)


def _replicas(plan: Plan) -> list[_Replica]:
    return [
        _Replica(variant, engine, _gpus(placement))
        for variant in plan.variants
        for engine in (_engine(variant),)
        for placement in variant.placement
    ]


def _gpus(placement: Sequence[NodeGpus]) -> frozenset[Gpu]:
    return frozenset((node.node, gpu) for node in placement for gpu in node.gpus)


def _engine(variant: Variant) -> str:
    """What an engine process is: another text, another process."""
    keep = {
        *("model", "catalogue_model", "checkpoint", "checkpoint_format"),
        *("pool", "beside", "simulated_gpu"),
    }
    text = variant.model_dump_json(include=keep) + variant.commit
    return text + variant.shape.model_dump_json(exclude={"prediction"})
