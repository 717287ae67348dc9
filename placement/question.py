"""From options to the numbers that are solved, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.dominance import undominated
from placement.fleet import FleetModel, FleetSpec
from placement.loading import load_s
from placement.node_groups import NodeGroup
from placement.option import Option, stressed
from placement.options import Options
from placement.plan import Plan, Rejection, Variant
from placement.problem import Column, Need, Problem


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
    needs, beyond = [], []
    for model, options in enumerate(found):
        kept, dropped = undominated(options)
        kept = (*kept, *_running_too(options, kept, before, groups))
        dominated += dropped
        mine = [
            _column(model, option, options.wish, fleet, before=before, groups=groups)
            for option in kept
        ]
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
    tie += 0.01 * (len(groups) + option.group) / (2 * len(groups))
    return Column(
        model=model,
        group=option.group,
        gpus=option.gpus_here,
        rate=rate,
        price=price,
        tie=tie,
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
    carried = most * max(column.rate for column in mine)
    least = max(wish.replicas.min, 1 if rate > 0 else 0)
    need = Need(
        rate=min(rate, carried),
        least=least,
        most=most,
        firm_rate=min(rate, carried) * (1 - fleet.max_spot_share),
        spread=wish.spread,
    )
    return need, rate > carried * (1 + 1e-9)
