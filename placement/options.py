"""The legal ways to run each model of a fleet, with what they carry and cost; and why not others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from placement.candidate import Candidate
from placement.candidates import candidates, wanted_checkpoints
from placement.catalogue import Catalogue
from placement.disaggregation import Pair, find_pairs
from placement.expert_nodes import over_fewest_nodes
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Pool
from placement.legality import RULES, describe, first_rejection
from placement.llamacpp_options import LlamacppOption, llamacpp_options
from placement.memory import memory_use
from placement.node_groups import NodeGroup
from placement.node_orders import Nodes
from placement.option import Option, Part, as_stressed, carried, quality, replicas_needed
from placement.performance import ReplicaSpeed, replica_speed
from placement.plan import Rejection
from placement.spanning import Spanning, Spans, spanning_candidates


@dataclass(frozen=True, slots=True)
class Options:
    """What was found for one model of the fleet."""

    wish: FleetModel
    legal: tuple[Option, ...]
    illegal: tuple[tuple[Candidate, Rejection], ...]
    rejected: tuple[Rejection, ...]
    pairs: tuple[Pair, ...] = ()  # `disaggregate`: cheapest first
    other_pairs: tuple[Pair, ...] = ()  # that none but those who run them need; not stressed
    untried_pairs: int = 0  # more than can be solved for


def find_options(
    wish: FleetModel, fleet: FleetSpec, groups: Sequence[NodeGroup], catalogue: Catalogue
) -> Options:
    """Judge every candidate on every group of nodes that `wish` allows; the legal ones best first.

    Raises:
        UnknownName: a model or GPU type is not known.
    """
    dearest = _dearest([group.pool for group in groups], catalogue)
    judge = _llamacpp_options if wish.engine == "llamacpp" else _vllm_options
    judged = judge(wish, groups, catalogue, dearest=dearest)
    legal = judged.legal
    found = find_pairs(wish, fleet, legal, groups)
    pairs = found.tried
    if fleet.robust == "require":
        legal = [as_stressed(option, wish) for option in legal]
        pairs = tuple(slow for pair in pairs if (slow := pair.as_stressed(wish)).carries_something)
    legal.sort(key=lambda option: _preference(option, wish, fleet))
    return Options(
        wish=wish,
        legal=tuple(legal),
        illegal=tuple(judged.illegal),
        rejected=(*judged.rejected, *found.rejected),
        pairs=pairs,
        other_pairs=found.others,
        untried_pairs=found.untried,
    )


@dataclass(slots=True)
class _Judged:
    legal: list[Option] = field(default_factory=list)
    illegal: list[tuple[Candidate, Rejection]] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


def _vllm_options(
    wish: FleetModel, groups: Sequence[NodeGroup], catalogue: Catalogue, *, dearest: float
) -> _Judged:
    judged = _Judged()
    allowed = _allowed(wish, groups)
    for where in allowed:
        here = candidates(wish, where[1].pool, catalogue)
        _judge(judged, wish, where, here, catalogue, dearest=dearest)
    needed = not judged.legal
    if wish.across_nodes == "always" or (wish.across_nodes == "needed" and needed):
        for where in allowed:
            wide = over_fewest_nodes(wish, where[1], catalogue)
            _judge(judged, wish, where, wide, catalogue, dearest=dearest)
    spans = _over_nodes(wish, groups, catalogue, needed=needed)
    for found in spans.found:
        if found.rejection is None:
            judged.legal.append(_spanning(wish, groups, found, catalogue, dearest=dearest))
            continue
        judged.illegal.append((found.candidate, found.rejection))
        judged.rejected.append(_in_pools(found.rejection, wish, found.nodes))
    judged.rejected += [_in_pools(entry, wish, ()) for entry in spans.left_out]
    judged.rejected += _missing_checkpoints(wish, catalogue)
    return judged


def _judge(
    judged: _Judged,
    wish: FleetModel,
    where: tuple[int, NodeGroup],
    found: Iterable[Candidate],
    catalogue: Catalogue,
    *,
    dearest: float,
) -> None:
    for candidate in found:
        rejection = first_rejection(candidate)
        if rejection is None:
            judged.legal.append(_option(wish, *where, candidate, catalogue, dearest=dearest))
            continue
        judged.illegal.append((candidate, rejection))
        judged.rejected.append(_in_group(rejection, wish, where[1]))


def _llamacpp_options(
    wish: FleetModel, groups: Sequence[NodeGroup], catalogue: Catalogue, *, dearest: float
) -> _Judged:
    judged = _Judged()
    for index, group in _allowed(wish, groups):
        shapes, refused = llamacpp_options(wish, group.pool, catalogue)
        judged.legal += [
            _llamacpp(wish, index, group, each, catalogue, dearest=dearest) for each in shapes
        ]
        judged.rejected += [_in_group(entry, wish, group) for entry in refused]
    return judged


def _allowed(wish: FleetModel, groups: Sequence[NodeGroup]) -> list[tuple[int, NodeGroup]]:
    return [
        (index, group)
        for index, group in enumerate(groups)
        if wish.pools is None or group.pool.name in wish.pools
    ]


def value(option: Option, wish: FleetModel, fleet: FleetSpec) -> float:
    """What the fleet's objective makes of an option; less is better.

    cost: price per hour, where a GPU whose price nobody knows counts as dear as the dearest.
    throughput: requests/s of all replicas, negative. headroom: the share of the capacity that the
    demand takes.
    """
    total = option.replicas * option.capacity.requests_per_s
    if fleet.objective == "throughput":
        return -total
    if fleet.objective == "headroom":
        return wish.demand.requests_per_s / total if wish.demand and total else 0.0
    return option.price_per_hour


def furthest(options: Options) -> tuple[Candidate, Rejection] | None:
    """The rejected candidate that came closest: broke the last rule, by the least."""
    order = list(RULES)

    def distance(entry: tuple[Candidate, Rejection]) -> tuple[int, int, str]:
        candidate, rejection = entry
        stage = order.index(rejection.rule)
        missing = memory_use(candidate).missing_bytes if candidate.device.memory_bytes else 0
        return (-stage, missing, str(describe(candidate)))

    return min(options.illegal, key=distance, default=None)


def _in_group(rejection: Rejection, wish: FleetModel, group: NodeGroup) -> Rejection:
    shape = {**rejection.shape, "model": wish.name, "pool": group.name}
    return rejection.model_copy(update={"shape": shape})


def _dearest(pools: Sequence[Pool], catalogue: Catalogue) -> float:
    """Of all prices that are known, also of GPUs that are not there.

    So that one more pool does not make those dearer whose price nobody knows.
    """
    known = [price_of(pool, catalogue) for pool in pools]
    known += [gpu.price_per_hour for gpu in catalogue.gpus.values()]
    return max((price for price in known if price is not None), default=0.0)


def price_of(pool: Pool, catalogue: Catalogue) -> float | None:
    """Of a GPU, per hour; None: nobody knows."""
    if pool.price_per_gpu_hour is not None:
        return pool.price_per_gpu_hour
    return catalogue.gpu(pool.gpu).price_per_hour


def _option(
    wish: FleetModel,
    index: int,
    group: NodeGroup,
    candidate: Candidate,
    catalogue: Catalogue,
    *,
    dearest: float,
) -> Option:
    """On one node, or on all GPUs of several."""
    simulated = candidate.device.gpu.name != catalogue.gpu(group.pool.gpu).name
    slots, nodes = 1 if simulated else candidate.num_ranks, candidate.num_nodes
    if nodes > 1:
        slots = nodes * group.pool.gpus_per_node
    option = _carrying(
        wish,
        group,
        candidate,
        replica_speed(candidate),
        catalogue,
        index=index,
        slots=slots,
        dearest=dearest,
    )
    each = replace(option.parts[0], gpus=slots // nodes)
    return replace(option, beside=(each,) * (nodes - 1))


def _over_nodes(
    wish: FleetModel, groups: Sequence[NodeGroup], catalogue: Catalogue, *, needed: bool
) -> Spans:
    """On several nodes, of one group or of many, where the fleet wants that."""
    if wish.across_nodes == "never" or (wish.across_nodes == "needed" and not needed):
        return Spans()
    if wish.nodes_per_replica > 1 or wish.layer_partition or (wish.data_parallel_size or 1) > 1:
        return Spans()  # the fleet has said where layers are to be
    places = [(group.pool, group.usable.nodes) for _, group in _allowed(wish, groups)]
    return spanning_candidates(wish, places, catalogue)


def _spanning(
    wish: FleetModel,
    groups: Sequence[NodeGroup],
    found: Spanning,
    catalogue: Catalogue,
    *,
    dearest: float,
) -> Option:
    index_of = {group.pool.name: index for index, group in enumerate(groups)}
    first, *others = (
        Part(
            group=index_of[each.pool.name],
            pool=each.pool,
            gpu=each.device.gpu,
            gpus=each.gpus,
            price_per_gpu_hour=_price_or(each.pool, catalogue, dearest),
        )
        for each in found.nodes
    )
    option = _carrying(
        wish,
        groups[first.group],
        found.candidate,
        replica_speed(found.candidate),
        catalogue,
        index=first.group,
        slots=found.candidate.num_ranks,
        dearest=dearest,
    )
    known = all(price_of(each.pool, catalogue) is not None for each in found.nodes)
    return replace(option, beside=tuple(others), price_known=known)


def _price_or(pool: Pool, catalogue: Catalogue, dearest: float) -> float:
    price = price_of(pool, catalogue)
    return dearest if price is None else price


def _in_pools(rejection: Rejection, wish: FleetModel, nodes: Sequence[Nodes]) -> Rejection:
    shape = {**rejection.shape, "model": wish.name}
    if nodes:
        counts = Counter(each.pool.name for each in nodes)
        shape["pool"] = " and ".join(
            name if count == 1 else f"{count} nodes of {name}" for name, count in counts.items()
        )
    return rejection.model_copy(update={"shape": shape})


def _llamacpp(
    wish: FleetModel,
    index: int,
    group: NodeGroup,
    found: LlamacppOption,
    catalogue: Catalogue,
    *,
    dearest: float,
) -> Option:
    option = _carrying(
        wish,
        group,
        found.candidate,
        found.speed,
        catalogue,
        index=index,
        slots=found.gpus_per_replica,
        dearest=dearest,
    )
    return replace(option, shape=found.shape, setup=found.setup, offloaded=found.offloaded)


def _carrying(
    wish: FleetModel,
    group: NodeGroup,
    candidate: Candidate,
    speed: ReplicaSpeed,
    catalogue: Catalogue,
    *,
    index: int,
    slots: int,
    dearest: float,
) -> Option:
    capacity = carried(wish, candidate, speed, wish.slo)
    needed = replicas_needed(wish, capacity)
    return Option(
        group=index,
        pool=group.pool,
        gpu=catalogue.gpu(group.pool.gpu),
        candidate=candidate,
        speed=speed,
        capacity=capacity,
        gpus_per_replica=slots,
        replicas_needed=needed,
        replicas=min(max(wish.replicas.min, needed), wish.replicas.max),
        price_per_gpu_hour=_price_or(group.pool, catalogue, dearest),
        price_known=price_of(group.pool, catalogue) is not None,
    )


def _preference(option: Option, wish: FleetModel, fleet: FleetSpec) -> tuple[object, ...]:
    """Options that carry the demand first, then the objective, cost, GPUs; the rest breaks ties."""
    return (
        option.capacity.concurrency == 0,
        max(0, option.replicas_needed - option.replicas),
        value(option, wish, fleet),
        option.price_per_hour,
        not option.price_known,
        option.gpus,
        quality(option),
    )


def _missing_checkpoints(wish: FleetModel, catalogue: Catalogue) -> list[Rejection]:
    model = catalogue.model(wish.model)
    if wish.precision == "any":
        return []
    have = sorted({checkpoint.precision for checkpoint in model.checkpoints})
    found = {checkpoint.precision for checkpoint in wanted_checkpoints(wish, model)}
    return [
        Rejection(
            shape={"model": wish.name, "precision": precision},
            rule="no-such-checkpoint",
            reason=f"{model.name} has no {precision} checkpoint, only {', '.join(have)}",
        )
        for precision in wish.precision
        if precision not in found
    ]
