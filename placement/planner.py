"""make_plan: which model runs in which shape on which GPUs, in how many replicas."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from placement.candidate import Candidate
from placement.capacity import DEFAULT_DEMAND, concurrency_for, load_at, ttft_p95_s
from placement.catalogue import Catalogue
from placement.first_fit import FreeGpus, ReplicaGpus
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory
from placement.options import Option, Options, find_options, value
from placement.performance import predict
from placement.plan import Plan, Predicted, Unmet, Variant
from placement.relaxation import not_enough_gpus, nothing_legal, replica_limit, service_level
from placement.shape import make_shape


def make_plan(fleet: FleetSpec, inventory: Inventory, catalogue: Catalogue) -> Plan:
    """Place every model of `fleet` on `inventory`; what cannot be had stands in `unmet`.

    Each model gets its best legal option by the fleet's objective, the models that take most GPUs
    first, on the first nodes with room. The same fleet and inventory give the same plan, in
    whatever order models and pools are written. A plan with anything unmet is infeasible; one in
    which every model got its best option is optimal.

    Raises:
        UnknownName: a model, pool or GPU type is not known, with the nearest names.
    """
    wishes = sorted(fleet.models, key=lambda wish: wish.name)
    for wish in wishes:
        if wish.simulate_gpu is not None:
            catalogue.gpu(wish.simulate_gpu)  # wrong also where no pool would look at it
    found = [find_options(wish, fleet, inventory, catalogue) for wish in wishes]
    free = FreeGpus(inventory)
    choices = [_choose(options, free) for options in sorted(found, key=_size, reverse=True)]
    names = _safe_names(wish.name for wish in wishes)
    variants = [
        _variant(choice, choice.option, names[choice.options.wish.name], catalogue)
        for choice in choices
        if choice.option is not None
    ]
    objective, bound = _objective(fleet, choices)
    first_choices = all(choice.option in (None, *choice.options.legal[:1]) for choice in choices)
    unmet = [choice.problem for choice in choices if choice.problem is not None]
    return Plan(
        fleet=fleet.fleet,
        status="infeasible" if unmet else "optimal" if first_choices else "feasible",
        objective=objective,
        bound=bound,
        gap=abs(objective - bound) / max(abs(objective), 1e-9),
        cost_per_hour=sum(choice.option.price_per_hour for choice in choices if choice.option),
        currency=inventory.currency,
        gpus_used=sum(choice.option.gpus for choice in choices if choice.option),
        gpus_total=sum(pool.nodes * pool.gpus_per_node for pool in inventory.pools),
        variants=tuple(sorted(variants, key=lambda variant: variant.variant)),
        unmet=tuple(sorted(unmet, key=lambda entry: entry.model)),
        rejected=tuple(entry for options in found for entry in options.rejected),
        gateway=fleet.gateway,
    )


@dataclass(frozen=True, slots=True)
class _Choice:
    """What one model gets, and what of its wishes that leaves open."""

    options: Options
    option: Option | None
    placement: tuple[ReplicaGpus, ...] = ()
    problem: Unmet | None = None


def _choose(options: Options, free: FreeGpus) -> _Choice:
    """The first option with room for all its replicas; else what fits of the roomiest."""
    if not options.legal:
        return _Choice(options, None, problem=nothing_legal(options))
    quick = [option for option in options.legal if option.capacity.concurrency > 0]
    if not quick:
        fastest = min(options.legal, key=lambda option: option.capacity.prediction.tpot_ms)
        return _Choice(options, None, problem=service_level(fastest, options))
    rooms = [free.replicas_that_fit(option.pool, option.gpus_per_replica) for option in quick]
    for option, room in zip(quick, rooms, strict=True):
        if room >= option.replicas:
            placement = free.take(option.pool, option.gpus_per_replica, option.replicas)
            short = option.replicas_needed > option.replicas
            problem = replica_limit(option, options) if short else None
            return _Choice(options, option, placement, problem)
    problem = not_enough_gpus(quick[0], options, free)
    room, roomiest = max(zip(rooms, quick, strict=True), key=lambda pair: pair[0])
    if room == 0:
        return _Choice(options, None, problem=problem)
    placement = free.take(roomiest.pool, roomiest.gpus_per_replica, room)
    return _Choice(options, replace(roomiest, replicas=room), placement, problem)


def _objective(fleet: FleetSpec, choices: list[_Choice]) -> tuple[float, float]:
    """The objective reached, and what it would be with every model's best option."""
    reached = [
        value(choice.option, choice.options.wish, fleet)
        for choice in choices
        if choice.option is not None
    ]
    best = [
        value(choice.options.legal[0], choice.options.wish, fleet)
        for choice in choices
        if choice.options.legal
    ]
    return sum(reached), sum(best)


def _variant(choice: _Choice, option: Option, safe_name: str, catalogue: Catalogue) -> Variant:
    wish, placement = choice.options.wish, choice.placement
    candidate = option.candidate
    spread = "-ep" if candidate.expert_parallel else ""
    model = catalogue.model(wish.model)
    return Variant(
        model=wish.name,
        variant=f"{safe_name}@{option.pool.name}-{_ranks(candidate)}{spread}",
        aliases=wish.aliases,
        catalogue_model=model.name,
        checkpoint=candidate.checkpoint.source,
        checkpoint_format=candidate.checkpoint.format,
        pool=option.pool.name,
        gpu=option.gpu.name,
        simulated_gpu=candidate.device.gpu.name if wish.engine == "sim" else None,
        shape=option.shape or make_shape(candidate, extra_args=wish.engine_args),
        replicas=len(placement),
        bounds=wish.replicas,
        scaling=wish.scaling,
        slo=wish.slo,
        gpus_per_replica=option.gpus_per_replica,
        placement=placement,
        capacity_requests_per_s=option.capacity.requests_per_s,
        predicted=_predicted(wish, option, len(placement)),
        capabilities=model.capabilities,
    )


def _ranks(candidate: Candidate) -> str:
    if candidate.engine == "llamacpp":
        return f"gguf-{candidate.checkpoint.precision}-pp{candidate.pipeline_parallel_size}"
    return f"tp{candidate.tensor_parallel_size}"


def _predicted(wish: FleetModel, option: Option, replicas: int) -> Predicted:
    """What users see when the demand is spread evenly; without a demand, one user alone."""
    demand = wish.demand or DEFAULT_DEMAND
    rate = demand.requests_per_s / max(replicas, 1)
    concurrency = concurrency_for(
        option.speed, rate_per_s=rate, at_most=option.capacity.concurrency, demand=demand
    )
    prediction = predict(option.speed, load_at(demand, concurrency))
    return Predicted(
        ttft_p95_s=ttft_p95_s(option.speed, prediction, demand),
        tpot_p95_ms=prediction.tpot_ms,
        utilization=rate / option.capacity.requests_per_s,
    )


def _size(options: Options) -> tuple[int, int, str]:
    """Big models first: they have the fewest places to go."""
    if not options.legal:
        return (0, 0, options.wish.name)
    best = options.legal[0]
    return (best.gpus_per_replica, best.gpus, options.wish.name)


def _safe_names(names: Iterable[str]) -> dict[str, str]:
    """The models' names as they may stand in a URL; a checksum where two would become one."""
    safe = {name: re.sub(r"[^A-Za-z0-9._-]", "-", name) for name in names}
    plain = list(safe.values())
    return {
        name: short
        if name == short or plain.count(short) == 1
        else f"{short}-{zlib.crc32(name.encode()):08x}"
        for name, short in safe.items()
    }
