"""Why a plan is as it is: the same problem solved again with one thing different."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from placement.catalogue import Catalogue
from placement.explanation import Explanation, Reason, WhatIf
from placement.fleet import FleetModel, FleetSpec, Objective
from placement.inventory import Inventory
from placement.milp import Limits
from placement.node_groups import NodeGroup, node_groups
from placement.option import Option, ranks
from placement.options import Options, find_options
from placement.plan import Plan, Variant
from placement.planner import select_for
from placement.problem import Problem
from placement.question import Question, make_question
from placement.selection import Selection
from placement.ways_out import ways_out

_SMALL = 100  # columns; beyond, answers are quick rather than exact


@dataclass(frozen=True, slots=True)
class Setting:
    """A fleet on an inventory, with its options found; values to vary."""

    fleet: FleetSpec
    catalogue: Catalogue
    groups: tuple[NodeGroup, ...]
    found: tuple[Options, ...]
    running: Plan | None

    @property
    def question(self) -> Question:
        """What is solved."""
        return make_question(self.fleet, self.groups, self.found, self.running)

    def select(self, question: Question) -> Selection | None:
        """The answer to a question like it; None: not all can be had."""
        return select_for(
            question,
            self.fleet,
            self.catalogue,
            running=self.running,
            limits=_limits(question.problem),
        )

    def with_model(self, wish: FleetModel) -> Setting:
        """Another wish in place of the one of its name."""
        options = find_options(wish, self.fleet, self.groups, self.catalogue)
        found = (options if old.wish.name == wish.name else old for old in self.found)
        return replace(self, found=tuple(found))


def explain(
    fleet: FleetSpec,
    inventory: Inventory,
    catalogue: Catalogue,
    plan: Plan,
    *,
    running: Plan | None = None,
) -> Explanation:
    """Reasons for `plan`, which is `make_plan` of the same fleet, inventory and running plan.

    Every answer is a plan for one thing changed: a variant forbidden, a node more, a service level
    halved or doubled.

    Raises:
        UnknownName: as `make_plan`.
    """
    groups = node_groups(fleet, inventory, catalogue)
    wishes = sorted(fleet.models, key=lambda wish: wish.name)
    found = tuple(find_options(wish, fleet, groups, catalogue) for wish in wishes)
    setting = Setting(fleet, catalogue, groups, found, running)
    now = None if plan.unmet else setting.select(setting.question)
    reasons = tuple(_reason(setting, now, plan, model) for model in range(len(wishes)))
    if now is None:
        return Explanation(reasons=reasons, ways_out=ways_out(fleet, inventory, catalogue, plan))
    return Explanation(
        reasons=reasons,
        what_if=(
            *_with_a_node_more(setting, now, plan.currency),
            *_with_other_levels(setting, now, plan.currency),
        ),
    )


def _limits(problem: Problem) -> Limits:
    if len(problem.columns) <= _SMALL:
        return Limits(time_s=5.0)
    return Limits(time_s=5.0, gap=0.01, nodes=20)


def _little(problem: Problem) -> float:
    """Share of the cost that is within what the problem is solved to."""
    return 1e-3 if len(problem.columns) <= _SMALL else 0.02


def _reason(setting: Setting, now: Selection | None, plan: Plan, model: int) -> Reason:
    question = setting.question
    name = question.options[model].wish.name
    mine = [variant for variant in plan.variants if variant.model == name]
    runner_up, costs = None, None
    if now is not None and any(variant.replicas for variant in mine):
        other = setting.select(_without(question, now, model))
        if other is not None:
            runner_up = _in_words(question, other, model)
            costs = _cost(question.problem, other) - _cost(question.problem, now)
    return Reason(
        model=name,
        chosen=tuple(map(_variant_in_words, mine)),
        runner_up=runner_up,
        runner_up_costs=costs,
        binding=_binding(mine),
    )


def _without(question: Question, now: Selection, model: int) -> Question:
    """The question in which the model may not use what it was given."""
    columns = tuple(
        replace(column, rate=0.0) if column.model == model and count else column
        for column, count in zip(question.problem.columns, now.counts, strict=True)
    )
    return replace(question, problem=replace(question.problem, columns=columns))


def _binding(variants: Sequence[Variant]) -> str:
    for variant in variants:
        if variant.limited_by:
            return f"{variant.variant}: more load would break {variant.limited_by}"
    for variant in variants:
        shape = variant.shape
        return (
            f"{variant.variant}: its slots and cache: {shape.request_slots} requests at once, "
            f"{shape.kv_cache_tokens:,} tokens"
        )
    return "it does not run"


def _with_a_node_more(setting: Setting, now: Selection, currency: str) -> Iterator[WhatIf]:
    problem = setting.question.problem
    for index, group in enumerate(setting.groups):
        larger = group.with_a_node_more()
        if larger.usable == group.usable:
            continue  # it would only be a spare one
        groups = (*setting.groups[:index], larger, *setting.groups[index + 1 :])
        found = setting.select(replace(setting, groups=groups).question)
        gpus = f"{group.pool.gpus_per_node} x {group.pool.gpu}"
        change = f"one more node in {_pools([pool.name for pool in group.pools], 'or')} ({gpus})"
        if found is not None and _matters(problem, found, now):
            yield _what_if(problem, change, now, found, currency)


def _with_other_levels(setting: Setting, now: Selection, currency: str) -> Iterator[WhatIf]:
    """Each promise of each model, halved and doubled."""
    problem = setting.question.problem
    for model, options in enumerate(setting.found):
        wish = options.wish
        for change, slo in _other_levels(wish):
            question = setting.with_model(wish.model_copy(update={"slo": slo})).question
            possible = question.problem.of_model(model) and not question.beyond_limit[model]
            found = setting.select(question) if possible else None
            if found is None:
                yield WhatIf(change=change, effect="is more than these pools can do")
            elif _matters(question.problem, found, now, before=problem):
                yield _what_if(question.problem, change, now, found, currency, before=problem)


def _other_levels(wish: FleetModel) -> Iterator[tuple[str, Objective]]:
    for factor in (0.5, 2.0):
        ttft, tpot = wish.slo.ttft_p95_s, wish.slo.tpot_p95_ms
        if ttft is not None:
            other = wish.slo.model_copy(update={"ttft_p95_s": ttft * factor})
            yield f"{wish.name}: TTFT p95 of {ttft * factor:g} s instead of {ttft:g} s", other
        if tpot is not None:
            other = wish.slo.model_copy(update={"tpot_p95_ms": tpot * factor})
            yield f"{wish.name}: TPOT p95 of {tpot * factor:g} ms instead of {tpot:g} ms", other


def _what_if(
    problem: Problem,
    change: str,
    now: Selection,
    then: Selection,
    currency: str,
    *,
    before: Problem | None = None,
) -> WhatIf:
    before = before or problem
    cost = _cost(problem, then) - _cost(before, now)
    gpus = _gpus(problem, then) - _gpus(before, now)
    words = []
    if abs(cost) >= 0.005:
        words.append(f"{'costs' if cost > 0 else 'saves'} {abs(cost):.2f} {currency}/h")
    if gpus:
        words.append(f"{'takes' if gpus > 0 else 'frees'} {abs(gpus)} GPUs")
    if problem.objective != "cost":
        words.append(f"{problem.objective} {_told(problem, now)} -> {_told(problem, then)}")
    return WhatIf(change=change, effect=", ".join(words), cost_per_hour=cost, gpus=gpus)


def _told(problem: Problem, selection: Selection) -> str:
    if problem.objective == "throughput":
        return f"{-selection.objective:.3g} requests/s"
    return f"{100 * selection.objective:.0f} % used"


def _matters(
    problem: Problem, then: Selection, now: Selection, *, before: Problem | None = None
) -> bool:
    if problem.objective != "cost":
        return abs(then.objective - now.objective) > _little(problem) * max(
            abs(now.objective), 1e-9
        )
    cost = _cost(before or problem, now)
    return abs(_cost(problem, then) - cost) > _little(problem) * max(cost, 1e-9)


def _cost(problem: Problem, selection: Selection) -> float:
    pairs = zip(problem.columns, selection.counts, strict=True)
    return sum(count * column.price for column, count in pairs)


def _gpus(problem: Problem, selection: Selection) -> int:
    pairs = zip(problem.columns, selection.counts, strict=True)
    return sum(count * column.all_gpus for column, count in pairs)


def _in_words(question: Question, selection: Selection, model: int) -> str:
    return " and ".join(
        _option_in_words(question.choices[index], selection.counts[index])
        for index in question.problem.of_model(model)
        if selection.counts[index]
    )


def _option_in_words(option: Option, replicas: int) -> str:
    return (
        f"{replicas} x {option.candidate.checkpoint.precision} on {option.hardware} "
        f"({ranks(option)}, {_pools(part.pool.name for part in option.parts)}"
        f"{_layers(option.candidate.layer_partition)})"
    )


def _variant_in_words(variant: Variant) -> str:
    return (
        f"{variant.replicas} x {variant.shape.precision} on {variant.hardware} "
        f"({_pools(variant.pools)}{_layers(variant.shape.layer_partition)}), "
        f"{100 * variant.predicted.utilization:.0f} % used"
    )


def _pools(names: Iterable[str], word: str = "and") -> str:
    pools = list(dict.fromkeys(names))
    return f"pool{'s' if len(pools) > 1 else ''} {f' {word} '.join(pools)}"


def _layers(partition: Sequence[int]) -> str:
    return f", layers {'+'.join(map(str, partition))}" if partition else ""
