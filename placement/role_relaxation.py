"""What stands in the way of prefill and decode replicas, and the smallest change, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from placement.disaggregation import Pair, why_not
from placement.missing_room import Free
from placement.option import Option
from placement.options import Options
from placement.packing import Places
from placement.plan import Unmet
from placement.question import Question


def roles_unmet(
    question: Question, counts: Sequence[int], model: int, beside: Callable[[int, Option], Free]
) -> Unmet | None:
    """What stays open of a model that only prefill and decode replicas can answer for."""
    options = question.options[model]
    if not options.pairs:
        return _no_pair(options)
    problem, pair = question.problem, options.pairs[0]
    if problem.met(counts, model):
        return _beyond_limit(pair, options) if question.beyond_limit[model] else None
    if problem.engines(counts, model) >= options.wish.replicas.max:
        return _beyond_limit(pair, options)
    reading, writing = (beside(model, side)[side.group] for side in pair.sides)
    return _no_room(pair, options, (reading, writing))


def _no_pair(options: Options) -> Unmet:
    """`disaggregate: always`, and no cache can be handed over between any two shapes."""
    return Unmet(
        model=options.wish.name,
        constraint=why_not(options.rejected)
        or "no prefill and decode replicas keep the service level, engines being as slow as feared",
        cheapest_relaxation="disaggregate: allowed",
    )


def _beyond_limit(pair: Pair, options: Options) -> Unmet:
    """The demand takes more prefill and decode replicas than `replicas.max`."""
    engines = pair.prefill.replicas_needed + pair.decode.replicas_needed
    return Unmet(
        model=options.wish.name,
        constraint=f"{_demand(options)} {_both(pair)}; replicas.max is {options.wish.replicas.max}",
        cheapest_relaxation=f"replicas.max: {engines}",
    )


def _no_room(pair: Pair, options: Options, free: tuple[Places, Places]) -> Unmet:
    """Nodes lack room for as many prefill or decode replicas; `free` is what others leave of each."""
    missing = [
        f"{count} more GPUs in pool {side.pool.name}, {side.gpus_here} to a node"
        for side, places in zip(pair.sides, free, strict=True)
        if (count := _missing(side, places))
    ]
    return Unmet(
        model=options.wish.name,
        constraint=f"{_demand(options)} {_both(pair)}, of which there are "
        f"{_room(pair.prefill, free[0])} and {_room(pair.decode, free[1])}",
        cheapest_relaxation=" and ".join(missing) or _more_nodes(pair.sides),
    )


def _demand(options: Options) -> str:
    rate = options.wish.demand.requests_per_s if options.wish.demand else 0.0
    return f"{rate:g} requests/s take"


def _both(pair: Pair) -> str:
    return (
        f"{pair.prefill.replicas_needed} places for prefill on {_on(pair.prefill)} and "
        f"{pair.decode.replicas_needed} for decode on {_on(pair.decode)}"
    )


def _on(side: Option) -> str:
    return f"pool {side.pool.name} ({side.hardware}, {side.capacity.requests_per_s:.3g} requests/s)"


def _room(side: Option, places: Places) -> int:
    return places.room(side.gpus_here)


def _missing(side: Option, places: Places) -> int:
    return max(0, side.replicas_needed - _room(side, places)) * side.gpus_here


def _more_nodes(sides: Sequence[Option]) -> str:
    pools = dict.fromkeys(side.pool.name for side in sides)
    return f"one more node in pool {' or '.join(pools)}"
