"""make_plan: which model runs in which shape on which GPUs, in how many replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from placement.catalogue import Catalogue
from placement.fleet import FleetSpec
from placement.inventory import Inventory
from placement.milp import Limits
from placement.node_groups import node_groups
from placement.node_loss import Lost, losses, node_loss
from placement.options import find_options, price_of
from placement.plan import Plan, Robustness, Unmet, Variant
from placement.problem import MET, Problem, score
from placement.question import Question, make_question
from placement.relaxation import too_little_after_a_loss
from placement.selection import Selection, select, select_all_met
from placement.shortage import shortage
from placement.variants import make_variants, refine

_LOSS_ROUNDS = 6


def make_plan(
    fleet: FleetSpec,
    inventory: Inventory,
    catalogue: Catalogue,
    *,
    running: Plan | None = None,
    limits: Limits | None = None,
) -> Plan:
    """Place every model of `fleet` on `inventory`; what cannot be had stands in `unmet`.

    The best plan by the fleet's objective, up to the gap that it tells: one model may run in
    several variants. With a `running` plan, what runs stays unless moving it pays within the
    fleet's horizon. The same fleet and inventory give the same plan, in whatever order models and
    pools are written. A plan with anything unmet is infeasible; one with no gap
    is optimal, unless more pairs of prefill and decode shapes were possible than were tried.

    Raises:
        UnknownName: a model, pool or GPU type is not known, with the nearest names.
    """
    for wish in fleet.models:
        if wish.simulate_gpu is not None:
            catalogue.gpu(wish.simulate_gpu)  # wrong also where no pool would look at it
    groups = node_groups(fleet, inventory, catalogue)
    found = [
        find_options(wish, fleet, groups, catalogue)
        for wish in sorted(fleet.models, key=lambda wish: wish.name)
    ]
    question = make_question(fleet, groups, found, running)
    solve = _Solve(fleet, catalogue, running, limits or Limits())
    solution = solve(question)
    demands = _demands(fleet)
    short: list[Unmet] = []
    if fleet.carry_node_loss:
        solution, short = _with_room_for_a_loss(solve, question, solution, demands)
    chosen, variants = solution.chosen, solution.variants
    cache = {"model_cache": fleet.model_cache}
    unmet = shortage(question, chosen.counts, fleet)
    unmet += [entry for entry in short if entry.model not in {each.model for each in unmet}]
    proven = not any(options.untried_pairs for options in found) and (
        chosen.objective - chosen.bound <= 1e-9 * max(1.0, abs(chosen.objective))
    )
    return Plan(
        fleet=fleet.fleet,
        status="infeasible" if unmet else "optimal" if proven else "feasible",
        objective=chosen.objective,
        bound=chosen.bound,
        gap=abs(chosen.objective - chosen.bound) / max(abs(chosen.objective), 1e-9),
        cost_per_hour=_cost(question, chosen),
        currency=inventory.currency,
        gpus_used=sum(variant.replicas * variant.gpus_per_replica for variant in variants),
        gpus_total=sum(pool.nodes * pool.gpus_per_node for pool in inventory.pools),
        variants=tuple(each.model_copy(update=cache) for each in variants),
        unmet=tuple(unmet),
        rejected=(*(entry for each in found for entry in each.rejected), *question.dominated),
        unpriced=_unpriced(variants, inventory, catalogue),
        robustness=solution.robustness,
        node_loss=node_loss(variants, inventory, demands),
        gateway=fleet.gateway,
        demands={wish.name: wish.demand for wish in fleet.models if wish.demand},
    )


def _unpriced(
    variants: Sequence[Variant], inventory: Inventory, catalogue: Catalogue
) -> tuple[str, ...]:
    used = {pool for variant in variants if variant.replicas for pool in variant.pools}
    unknown = {pool.name for pool in inventory.pools if price_of(pool, catalogue) is None}
    return tuple(sorted(used & unknown))


@dataclass(frozen=True, slots=True)
class _Solution:
    chosen: Selection
    robustness: Robustness | None
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class _Solve:
    """From a question to variants on named GPUs."""

    fleet: FleetSpec
    catalogue: Catalogue
    running: Plan | None
    limits: Limits

    def __call__(self, question: Question) -> _Solution:
        chosen = select(question.problem, self.limits)
        chosen, robustness = _prefer_robust(question, chosen, self.limits, self.fleet)
        picked = refine(question, chosen.counts)
        variants = make_variants(question, picked, self.catalogue, self.running)
        return _Solution(chosen, robustness, variants)


def select_for(
    question: Question,
    fleet: FleetSpec,
    catalogue: Catalogue,
    *,
    running: Plan | None = None,
    limits: Limits,
) -> Selection | None:
    """What `make_plan` would choose, for a question that may differ; None: not all can be had."""
    if not fleet.carry_node_loss:
        return select_all_met(question.problem, limits)
    lenient = fleet.model_copy(update={"robust": "off"})
    solve = _Solve(lenient, catalogue, running, limits)
    solution = solve(question)
    if not question.problem.meets(solution.chosen.counts):
        return None
    solution, short = _with_room_for_a_loss(solve, question, solution, _demands(fleet))
    return None if short else solution.chosen


def _demands(fleet: FleetSpec) -> dict[str, float]:
    return {wish.name: wish.demand.requests_per_s for wish in fleet.models if wish.demand}


def _with_room_for_a_loss(
    solve: _Solve, question: Question, solution: _Solution, demands: Mapping[str, float]
) -> tuple[_Solution, list[Unmet]]:
    """Raise what models need by what the loss of a node takes, until that leaves their demand.

    How much a node takes is known once replicas have their GPUs, so the problem is solved again.
    Where not all can be raised, each is that can.
    """
    harder, hopeless = question, set[int]()
    doubled = _doubled(question)
    twice = solve(doubled)
    if doubled.problem.meets(twice.chosen.counts):
        harder, solution = doubled, twice
    best = solution.chosen.bound  # nothing that carries a loss is better
    for _ in range(_LOSS_ROUNDS):
        short = _short_after_a_loss(question, solution, demands)
        wanted = {model: lost for model, lost in short.items() if model not in hopeless}
        if not wanted or not harder.problem.meets(solution.chosen.counts):
            break
        raised = _raised(harder, solution, wanted)
        better = solve(raised)
        if raised.problem.meets(better.chosen.counts):
            harder, solution = raised, better
            continue
        for model, lost in wanted.items():
            raised = _raised(harder, solution, {model: lost})
            better = solve(raised)
            if raised.problem.meets(better.chosen.counts):
                harder, solution = raised, better
                break  # what the others lose may be different now
            hopeless.add(model)
    chosen = replace(solution.chosen, bound=min(solution.chosen.objective, best))
    short = _short_after_a_loss(question, solution, demands)
    return replace(solution, chosen=chosen), [
        too_little_after_a_loss(lost.node, lost.left, lost.wanted, question.options[model])
        for model, lost in short.items()
    ]


def _doubled(question: Question) -> Question:
    """The question in which every model that must run has two replicas, and enough without a node.

    No loss is carried by less; should replicas not lie evenly on nodes, more is needed.
    """
    needs = tuple(
        replace(
            need,
            least=max(need.least, min(2, need.most)),
            rate_after_loss=need.rate,
            replicas_after_loss=0 if need.rate > 0 else min(1, need.most - 1),
        )
        if need.least
        else need
        for need in question.problem.needs
    )
    return replace(question, problem=replace(question.problem, needs=needs))


def _short_after_a_loss(
    question: Question, solution: _Solution, demands: Mapping[str, float]
) -> dict[int, Lost]:
    lost = {each.model: each for each in losses(solution.variants, demands)}
    return {
        model: lost[options.wish.name]
        for model, options in enumerate(question.options)
        if options.wish.name in lost and lost[options.wish.name].share < MET
    }


def _raised(question: Question, solution: _Solution, lost: Mapping[int, Lost]) -> Question:
    """The question in which these models have what a node takes beside their demand.

    One replica becomes two, which may be smaller; more must carry the demand and what a node takes.
    """
    needs = list(question.problem.needs)
    for model, each in lost.items():
        replicas = question.problem.replicas(solution.chosen.counts, model)
        if needs[model].rate > 0 and replicas > 1:
            needs[model] = replace(needs[model], rate=each.wanted + each.taken)
        else:
            needs[model] = replace(needs[model], least=replicas + 1)
    return replace(question, problem=replace(question.problem, needs=tuple(needs)))


def _cost(question: Question, chosen: Selection) -> float:
    return sum(
        count * column.price
        for count, column in zip(chosen.counts, question.problem.columns, strict=True)
    )


def _prefer_robust(
    question: Question, chosen: Selection, limits: Limits, fleet: FleetSpec
) -> tuple[Selection, Robustness | None]:
    """Of plans that are equally good, one that holds when predictions are too rosy.

    Faster engines and more memory hurt nobody, so one corner of the errors stands for all.
    """
    if fleet.robust != "prefer":
        return chosen, None
    if not question.problem.meets(chosen.counts):
        return chosen, None
    stressed = _without_new_roles(question.stressed(), chosen)
    names = [options.wish.name for options in question.options]
    short = [name for model, name in enumerate(names) if not stressed.met(chosen.counts, model)]
    if not short:
        return chosen, Robustness(holds=True)
    other = select_all_met(stressed, limits)
    if other is None:
        return chosen, Robustness(holds=False, short=tuple(short))
    reached = score(question.problem, other.counts)
    if reached <= chosen.objective + 1e-9 * max(1.0, abs(chosen.objective)):
        return (
            Selection(other.counts, reached, min(reached, chosen.bound), chosen.seconds),
            Robustness(holds=True),
        )
    return chosen, Robustness(holds=False, short=tuple(short), objective_to_hold=reached)


def _without_new_roles(problem: Problem, chosen: Selection) -> Problem:
    """Prefill and decode replicas must be better, not as good: only models that have them keep them."""
    in_roles = {
        column.model
        for column, count in zip(problem.columns, chosen.counts, strict=True)
        if count and column.pair is not None
    }
    columns = tuple(
        column if column.pair is None or column.model in in_roles else replace(column, rate=0.0)
        for column in problem.columns
    )
    return replace(problem, columns=columns)
