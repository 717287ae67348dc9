"""From options to the numbers that are solved, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.disaggregation import Pair
from placement.dominance import undominated
from placement.fleet import FleetModel, FleetSpec
from placement.loading import load_s
from placement.node_groups import NodeGroup
from placement.option import Option, stressed
from placement.options import Options
from placement.plan import Plan, Rejection, Variant
from placement.problem import Column, Need, Problem

_LIKELIER_WHOLE = 0.1  # of a GPU: roles must be better than whole replicas, not as good


@dataclass(frozen=True, slots=True)
class Question:
    """A problem, and what its numbers stand for."""

    problem: Problem
    groups: tuple[NodeGroup, ...]
    options: tuple[Options, ...]  # of each model
    choices: tuple[Option, ...]  # of each column
    beyond_limit: tuple[bool, ...]  # of each model: its demand needs more than `replicas.max`
    dominated: tuple[Rejection, ...]

    def stressed(self) -> Problem:
        """The same with engines that are slower, and have less memory, than predicted."""
        columns = [
            replace(
                column,
                rate=stressed(option, self.options[column.model].wish).requests_per_s,
            )
            for column, option in zip(self.problem.columns, self.choices, strict=True)
        ]
        return replace(self.problem, columns=tuple(columns))


def make_question(
    fleet: FleetSpec,
    groups: tuple[NodeGroup, ...],
    found: Sequence[Options],
    running: Plan | None,
) -> Question:
    """The problem of placing models with these options on these groups of nodes."""
    before = running.variants if running is not None else ()
    columns: list[Column] = []
    choices: list[Option] = []
    dominated: list[Rejection] = []
    needs, beyond, number = [], [], 0
    for model, options in enumerate(found):
        kept: tuple[Option, ...] = ()
        if options.wish.disaggregate != "always":
            kept, dropped = undominated(options)
            kept = (*kept, *_running_too(options, kept, before, groups))
            dominated += dropped
        mine = [
            _column(model, option, options.wish, fleet, before=before, groups=groups)
            for option in kept
        ]
        for pair in (*options.pairs, *_running_pairs(options, fleet, before, groups)):
            mine += [
                replace(
                    _column(model, side, options.wish, fleet, before=before, groups=groups),
                    pair=number,
                )
                for side in pair.sides
            ]
            kept = (*kept, pair.prefill, pair.decode)
            number += 1
        need, too_much = _need(options.wish, mine, fleet)
        columns += mine
        choices += kept
        needs.append(need)
        beyond.append(too_much)
    return Question(
        problem=Problem(
            columns=tuple(columns),
            needs=tuple(needs),
            groups=tuple(group.usable for group in groups),
            objective=fleet.objective,
        ),
        groups=groups,
        options=tuple(found),
        choices=tuple(choices),
        beyond_limit=tuple(beyond),
        dominated=tuple(dominated),
    )


def same_engine(option: Option, variant: Variant, wish: FleetModel) -> bool:
    """Whether a variant of the running plan is this option, up to limits that may be changed."""
    candidate, shape = option.candidate, variant.shape
    return (
        variant.model == wish.name
        and variant.role == candidate.role
        and variant.checkpoint == candidate.checkpoint.source
        and shape.precision == candidate.checkpoint.precision  # one repository may have many
        and variant.gpus_per_replica == option.gpus_per_replica
        and shape.engine == candidate.engine
        and shape.tensor_parallel_size == candidate.tensor_parallel_size
        and shape.pipeline_parallel_size == candidate.pipeline_parallel_size
        and shape.data_parallel_size == candidate.data_parallel_size
        and shape.num_nodes == candidate.num_nodes
        and shape.expert_parallel == candidate.expert_parallel
        and shape.layer_partition == candidate.layer_partition
    )


def running_here(
    option: Option, wish: FleetModel, before: Sequence[Variant], groups: Sequence[NodeGroup]
) -> list[Variant]:
    """The running variants that are this option."""
    wanted = [{pool.name for pool in groups[part.group].pools} for part in option.parts]
    return [
        each
        for each in before
        if len(each.pools) == len(wanted)
        and all(pool in pools for pool, pools in zip(each.pools, wanted, strict=True))
        and same_engine(option, each, wish)
    ]


def _running_too(
    options: Options,
    kept: Sequence[Option],
    before: Sequence[Variant],
    groups: Sequence[NodeGroup],
) -> list[Option]:
    """Dominated options that run: to leave them may be better than to replace them."""
    return [
        option
        for option in options.legal
        if option.capacity.concurrency > 0
        and option not in kept
        and running_here(option, options.wish, before, groups)
    ]


def _running_pairs(
    options: Options,
    fleet: FleetSpec,
    before: Sequence[Variant],
    groups: Sequence[NodeGroup],
) -> list[Pair]:
    """Pairs that run, though others are cheaper: to leave them may be better than to replace them."""
    wish = options.wish
    found = [
        pair
        for pair in (options.other_pairs if before else ())
        if all(running_here(side, wish, before, groups) for side in pair.sides)
    ]
    if fleet.robust == "require":
        return [pair.as_stressed(wish) for pair in found]
    return found


def _column(
    model: int,
    option: Option,
    wish: FleetModel,
    fleet: FleetSpec,
    *,
    before: Sequence[Variant],
    groups: Sequence[NodeGroup],
) -> Column:
    price = option.price_per_replica
    rate = option.capacity.requests_per_s
    there = running_here(option, wish, before, groups)
    unit = rate if fleet.objective == "throughput" else price
    tie = option.gpus_per_replica * (1.0 if option.price_known else 2.0)
    tie += _LIKELIER_WHOLE if option.candidate.role != "whole" else 0.0
    tie += 0.01 * (len(groups) + option.group) / (2 * len(groups))
    return Column(
        model=model,
        group=option.group,
        gpus=option.gpus_here,
        rate=rate,
        price=price,
        tie=tie,
        role=option.candidate.role,
        spot=any(part.pool.spot for part in option.parts),
        zone=option.pool.labels.get("zone", ""),
        running=sum(len(variant.placement) for variant in there),
        move=unit * load_s(option) / fleet.horizon_s if before else 0.0,
        beside=tuple((part.group, part.gpus) for part in option.beside),
    )


def _need(wish: FleetModel, mine: Sequence[Column], fleet: FleetSpec) -> tuple[Need, bool]:
    """What the model must get, and whether its demand is more than `replicas.max` can carry."""
    if not mine:
        return Need(rate=0.0, least=0, most=0), False
    most = wish.replicas.max
    if wish.demand is None:
        least = max(1, wish.replicas.min)
        return Need(rate=0.0, least=least, most=most, spread=wish.spread), False
    rate = wish.demand.requests_per_s
    carried = _most_carried(mine, most)
    least = max(wish.replicas.min, 1 if rate > 0 else 0)
    need = Need(
        rate=min(rate, carried),
        least=least,
        most=most,
        firm_rate=min(rate, carried) * (1 - fleet.max_spot_share),
        spread=wish.spread,
    )
    return need, rate > carried * (1 + 1e-9)


def _most_carried(columns: Sequence[Column], most: int) -> float:
    """Requests/s of at most so many replicas of one model, whatever nodes there are."""
    whole = max((column.rate for column in columns if column.pair is None), default=0.0)
    best = most * whole
    sides: dict[int, dict[str, float]] = {}
    for column in columns:
        if column.pair is not None:
            sides.setdefault(column.pair, {})[column.role] = column.rate
    for pair in sides.values():
        prefill, decode = pair["prefill"], pair["decode"]
        if prefill <= 0 or decode <= 0:
            continue
        for engines in range(2, most + 1):
            writing = min(engines - 1, max(1, math.floor(engines * prefill / (prefill + decode))))
            for answers in (writing, min(engines - 1, writing + 1)):
                both = min(answers * decode, (engines - answers) * prefill)
                best = max(best, both + (most - engines) * whole)
    return best
