"""From counted replicas to variants: which checkpoint, which GPUs, what users will see."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from placement.catalogue import Catalogue
from placement.fleet import FleetModel, ReplicaBounds
from placement.option import Option, quality, ranks, stressed
from placement.placing import Pools, ReplicaGpus, placements
from placement.plan import Plan, StageNodes, Variant
from placement.planned_speed import PlannedSpeed
from placement.predictions import ModelLoad, predicted
from placement.question import Question
from placement.replica_speed import speed_setup_of
from placement.shape import make_shape
from placement.shares import Share, shared_bounds


@dataclass(frozen=True, slots=True)
class Picked:
    """An option with the replicas that it gets."""

    model: int
    option: Option
    replicas: int


def refine(question: Question, counts: Sequence[int]) -> tuple[Picked, ...]:
    """The options behind the counts; a model that needs nothing now keeps its best at 0 replicas.

    The solver knows for each model, nodes and number of GPUs only the fastest checkpoint. Another
    may carry the demand as well: then the one that also does so when engines are slower than
    predicted, that has the longest context, that is nearest to the original weights.
    """
    columns = question.problem.columns
    used = {index: question.choices[index] for index, count in enumerate(counts) if count > 0}
    picked = []
    for index in list(used):
        # The next of the same model must not count on speed that is given away here.
        option = _best_checkpoint(question, counts, index, used)
        used[index] = option
        picked.append(Picked(columns[index].model, option, counts[index]))
    there = {each.model for each in picked}
    for model, options in enumerate(question.options):
        quick = [option for option in options.legal if option.capacity.concurrency > 0]
        if model in there or question.problem.needs[model].least > 0:
            continue
        if quick and options.wish.disaggregate != "always":
            picked.append(Picked(model, quick[0], 0))
        elif options.pairs:
            pair = options.pairs[0]
            picked += [Picked(model, pair.prefill, 0), Picked(model, pair.decode, 0)]
    return tuple(picked)


def _best_checkpoint(
    question: Question, counts: Sequence[int], index: int, used: Mapping[int, Option]
) -> Option:
    """Of the options like the chosen one; `used` are those of all columns in use."""
    problem, chosen = question.problem, question.choices[index]
    column = problem.columns[index]
    mine = [other for other in problem.of_model(column.model) if other in used]
    same = [other for other in mine if _alike(question.choices[other], chosen)]
    roles = any(counts[index] for pair in problem.pairs(column.model) for index in pair)
    if problem.objective != "cost" or column.running > 0 or len(same) > 1 or roles:
        return chosen
    options, need = question.options[column.model], problem.needs[column.model]
    others = [(i, counts[i], used[i]) for i in mine if i != index]
    rate = sum(count * option.capacity.requests_per_s for _, count, option in others)
    firm = need.firm_rate - sum(
        count * option.capacity.requests_per_s
        for i, count, option in others
        if not problem.columns[i].spot
    )
    least = max(need.rate - rate, 0.0 if column.spot else firm) * (1 - 1e-9)
    enough = [
        option
        for option in options.legal
        if _alike(option, chosen)
        and option.capacity.concurrency > 0
        and counts[index] * option.capacity.requests_per_s >= least
    ]
    if len(enough) < 2:
        return chosen
    slow = sum(count * stressed(each, options.wish).requests_per_s for _, count, each in others)

    def rank(option: Option) -> tuple[object, ...]:
        own = counts[index] * stressed(option, options.wish).requests_per_s
        return slow + own < need.rate, quality(option)

    return min(_fastest(enough), key=rank)


def _fastest(options: Iterable[Option]) -> list[Option]:
    """Of each checkpoint and context: how its GPUs share the model is no matter of quality.

    A simulation takes one slot whatever GPUs it stands for: of these as few as hold the model.
    """
    found: dict[tuple[str, str, int, int], Option] = {}
    for option in options:
        candidate = option.candidate
        checkpoint = candidate.checkpoint
        cut = (candidate.max_model_len, candidate.num_ranks)
        key = (checkpoint.source, checkpoint.precision, *cut)
        best = found.setdefault(key, option)
        if option.capacity.requests_per_s > best.capacity.requests_per_s:
            found[key] = option
    return list(found.values())


def _alike(one: Option, other: Option) -> bool:
    if not one.beside and not other.beside:
        return one.group == other.group and one.gpus_per_replica == other.gpus_per_replica
    return [(part.group, part.gpus) for part in one.parts] == [
        (part.group, part.gpus) for part in other.parts
    ]


def make_variants(
    question: Question,
    picked: Sequence[Picked],
    catalogue: Catalogue,
    running: Plan | None,
) -> tuple[Variant, ...]:
    """Every variant of the plan, with the GPUs of its replicas, by name."""
    placed = placements(
        question, [(each.model, each.option, each.replicas) for each in picked], running
    )
    parts = [
        (each, pools, placement)
        for each, by_pools in zip(picked, placed, strict=True)
        for pools, placement in by_pools.items()
    ]
    names = _names(question, parts)
    loads = [
        ModelLoad.of(question.options[m].wish, [each for each in picked if each.model == m])
        for m in range(len(question.options))
    ]
    bounds = _bounds(question, parts)
    variants = [
        _variant(
            question.options[each.model].wish,
            each.option,
            pools=pools,
            placement=placement,
            name=names[index],
            bounds=bounds[index],
            load=loads[each.model],
            catalogue=catalogue,
        )
        for index, (each, pools, placement) in enumerate(parts)
    ]
    return tuple(sorted(variants, key=lambda variant: (variant.model, variant.variant)))


_Part = tuple[Picked, Pools, tuple[ReplicaGpus, ...]]


def _names(question: Question, parts: Sequence[_Part]) -> list[str]:
    safe = _safe_names(options.wish.name for options in question.options)
    names = []
    for each, pools, _ in parts:
        where = "-and-".join(_counted(pools))
        name = f"{safe[question.options[each.model].wish.name]}@{where}-{ranks(each.option)}"
        name += "-ep" if each.option.candidate.expert_parallel else ""
        role = each.option.candidate.role
        names.append(name if role == "whole" else f"{name}-{role}")
    options = [each.option for each, _, _ in parts]
    for more in (
        [option.candidate.checkpoint.precision for option in options],
        ["-".join(str(part.gpus) for part in option.parts) for option in options],
        list(map(str, range(len(options)))),
    ):
        names = [
            name if names.count(name) == 1 else f"{name}-{tail}"
            for name, tail in zip(names, more, strict=True)
        ]
    return names


def _counted(pools: Pools) -> list[str]:
    """Each pool once; of several, with the number of nodes."""
    counts = Counter(pools)
    return [
        name if count == 1 or len(counts) == 1 else f"{count}-{name}"
        for name, count in counts.items()
    ]


def _bounds(question: Question, parts: Sequence[_Part]) -> list[ReplicaBounds]:
    bounds = [question.options[each.model].wish.replicas for each, _, _ in parts]
    for model in range(len(question.options)):
        mine = [index for index, (each, _, _) in enumerate(parts) if each.model == model]
        if not mine:
            continue
        shares = [
            Share(
                role=parts[index][0].option.candidate.role,
                replicas=len(parts[index][2]),
                price_per_request=_price_per_request(parts[index][0].option),
            )
            for index in mine
        ]
        for index, each in zip(mine, shared_bounds(bounds[mine[0]], shares), strict=True):
            bounds[index] = each
    return bounds


def _price_per_request(option: Option) -> tuple[float, str]:
    return option.price_per_replica / option.capacity.requests_per_s, option.pool.name


def _variant(
    wish: FleetModel,
    option: Option,
    *,
    pools: Pools,
    placement: tuple[ReplicaGpus, ...],
    name: str,
    bounds: ReplicaBounds,
    load: ModelLoad,
    catalogue: Catalogue,
) -> Variant:
    candidate, model = option.candidate, catalogue.model(wish.model)
    return Variant(
        model=wish.name,
        variant=name,
        aliases=wish.aliases,
        adapters=wish.adapters,
        catalogue_model=model.name,
        checkpoint=candidate.checkpoint.source,
        checkpoint_format=candidate.checkpoint.format,
        revision=wish.revision or "main",
        pool=pools[0],
        gpu=option.gpu.name,
        beside=tuple(
            StageNodes(pool=pool, gpu=part.gpu.name, gpus=part.gpus)
            for pool, part in zip(pools[1:], option.beside, strict=True)
        ),
        simulated_gpu=candidate.device.gpu.name if wish.engine == "sim" else None,
        shape=option.shape or make_shape(candidate, extra_args=wish.engine_args),
        role=candidate.role,
        replicas=len(placement),
        bounds=bounds,
        scaling=wish.scaling,
        slo=wish.slo,
        gpus_per_replica=option.gpus_per_replica,
        price_per_hour=len(placement) * option.price_per_replica,
        placement=placement,
        capacity_requests_per_s=option.capacity.requests_per_s,
        limited_by=option.capacity.broken_promise,
        predicted=predicted(option, load),
        speed=_planned_speed(option),
        capabilities=model.capabilities,
        routing=wish.routing,
        fallback=wish.fallback,
    )


def _planned_speed(option: Option) -> PlannedSpeed | None:
    """None in a role: the model's times are of engines that read prompts and write answers."""
    if option.candidate.role != "whole":
        return None
    setup = option.setup or speed_setup_of(option.candidate)
    return PlannedSpeed(setup=setup, costs=option.speed)


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
