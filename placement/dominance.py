"""Options that no plan needs, because another can always stand in their place."""

from __future__ import annotations

from placement.legality import describe
from placement.option import Option
from placement.options import Options
from placement.plan import Rejection


def undominated(options: Options) -> tuple[tuple[Option, ...], tuple[Rejection, ...]]:
    """The options that a plan may need, and why not the others.

    An option is dominated where another that carries no less would fit into its place: on a part of
    its nodes, with no more GPUs of any of them. Among equals the first, which is preferred, stays.
    """
    kept: list[Option] = []
    dropped = []
    quick = [option for option in options.legal if option.capacity.concurrency > 0]
    for option in sorted(quick, key=lambda each: (each.gpus_per_replica, -_rate(each))):
        better = next((each for each in kept if _dominates(each, option)), None)
        if better is None:
            kept.append(option)
            continue
        shape = {**describe(option.candidate), "model": options.wish.name, "pool": option.pool.name}
        reason = (
            f"{better.candidate.checkpoint.precision} on {better.hardware} carries "
            f"{_rate(better):.3g} requests/s, this {_rate(option):.3g} on {_gpus(option)}"
        )
        dropped.append(Rejection(shape=shape, rule="dominated", reason=reason))
    order = {id(option): index for index, option in enumerate(options.legal)}
    return tuple(sorted(kept, key=lambda each: order[id(each)])), tuple(dropped)


def _dominates(one: Option, other: Option) -> bool:
    if _rate(one) < _rate(other):
        return False
    if not one.beside and not other.beside:
        return one.group == other.group and one.gpus_per_replica <= other.gpus_per_replica
    here, there = _by_group(one), _by_group(other)
    return all(
        len(gpus) <= len(there.get(group, ()))
        and all(few <= many for few, many in zip(gpus, there[group], strict=False))
        for group, gpus in here.items()
    )


def _by_group(option: Option) -> dict[int, list[int]]:
    """GPUs that a replica takes of each node, most first; in which order its stages are is all one."""
    found: dict[int, list[int]] = {}
    for part in option.parts:
        found.setdefault(part.group, []).append(part.gpus)
    for gpus in found.values():
        gpus.sort(reverse=True)
    return found


def _gpus(option: Option) -> str:
    return option.hardware if option.beside else str(option.gpus_per_replica)


def _rate(option: Option) -> float:
    return option.capacity.requests_per_s
