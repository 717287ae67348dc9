"""What of a fleet's wishes stays open, model by model, each with a way out.

All ways out together let the fleet fit: a model's GPUs are counted beside those of the models that
have what they need, and of those whose way out was told before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from placement.candidate import Candidate, device_of
from placement.fleet import FleetSpec
from placement.missing_room import Free, missing_gpus, places_for, room_for, wanted_replicas
from placement.option import Option
from placement.options import Options, furthest
from placement.packing import Places
from placement.plan import Unmet
from placement.problem import MET
from placement.question import Question
from placement.relaxation import (
    no_memory_to_spare,
    nothing_legal,
    out_of_room,
    too_much_on_spot,
    too_slow,
)
from placement.slower_level import Slower, slower_level

_MOST_TRIED = 6  # options that could serve a model more slowly


def shortage(question: Question, counts: Sequence[int], fleet: FleetSpec) -> list[Unmet]:
    """The wishes that `counts` replicas of each column leave open."""
    room, certain = _Room(question, counts, fleet.carry_node_loss), fleet.robust == "require"
    entries = (_unmet(room, model, certain=certain) for model in range(len(question.options)))
    return [entry for entry in entries if entry is not None]


@dataclass(slots=True)
class _Room:
    """Nodes as others fill them: as planned, or as their way out says."""

    question: Question
    counts: Sequence[int]
    carry_node_loss: bool
    told: set[int] = field(default_factory=set)  # models whose way out is known
    reserved: defaultdict[int, list[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # by group: GPUs and replicas of those models

    def beside(self, model: int, option: Option) -> Free:
        """What others leave of the nodes of each group that `option` would use."""
        return {group: self._left(model, group) for group in {p.group for p in option.parts}}

    def _left(self, model: int, group: int) -> Places:
        usable = self.question.groups[group].usable
        places = Places(usable.nodes, usable.gpus_per_node)
        others = [
            (gpus, count)
            for column, count in zip(self.question.problem.columns, self.counts, strict=True)
            if count and column.model != model and column.model not in self.told
            for other, gpus in column.parts
            if other == group
        ]
        for gpus, count in sorted([*others, *self.reserved[group]], reverse=True):
            places.take(gpus, min(count, places.room(gpus)))
        return places

    def with_spare(self, option: Option) -> Option:
        """The option, needed as often as the loss of a node asks for, if that must be carried.

        A node has at most a quarter of a model's replicas where there is room elsewhere, rounded up.
        """
        needed = max(1, option.replicas_needed)
        if not self.carry_node_loss:
            return option
        on_a_node = self.question.groups[option.group].pool.gpus_per_node // option.gpus_here
        return replace(option, replicas_needed=needed + min(on_a_node, -(-needed // 3)))

    def places_like(self, model: int, candidate: Candidate) -> int:
        """Replicas of a candidate that is no option for which others leave room; 1: nobody knows."""
        if candidate.rank_devices or candidate.num_nodes > 1:
            return 1
        rooms = [
            self._left(model, index).room(candidate.num_ranks)
            for index, group in enumerate(self.question.groups)
            if device_of(group.pool, candidate.device.gpu) == candidate.device
        ]
        return max(rooms, default=1)

    def reserve(self, model: int, option: Option, replicas: int) -> None:
        """The model's way out is to have so many replicas of `option`."""
        self.told.add(model)
        for part in option.parts:
            self.reserved[part.group].append((part.gpus, replicas))


def _unmet(room: _Room, model: int, *, certain: bool) -> Unmet | None:
    question, counts = room.question, room.counts
    options, problem = question.options[model], question.problem
    quick = [room.with_spare(each) for each in options.legal if each.capacity.concurrency > 0]
    if not quick:
        return _impossible(room, model, certain=certain)
    if problem.met(counts, model):
        return _out_of_room(room, model, quick) if question.beyond_limit[model] else None
    need, firm = problem.needs[model], problem.rate(counts, model, firm_only=True)
    if firm >= need.firm_rate * MET:
        return _out_of_room(room, model, quick)
    if problem.rate(counts, model) >= need.rate * MET:
        return too_much_on_spot(options, firm_rate=need.firm_rate, firm=firm)
    on_demand = [option for option in quick if not any(part.pool.spot for part in option.parts)]
    if on_demand:
        return _out_of_room(room, model, on_demand)
    best = _least_effort(room, model, quick)
    more = room_for(best, options, room.beside(model, best))
    return too_much_on_spot(options, firm_rate=need.firm_rate, firm=firm, more=more)


def _impossible(room: _Room, model: int, *, certain: bool) -> Unmet:
    """It fits nowhere, or not even one request alone is fast enough."""
    options = room.question.options[model]
    if not options.legal:
        closest = furthest(options)
        places = room.places_like(model, closest[0]) if closest is not None else 1
        replicas = max(1, min(options.wish.replicas.max, places))
        return nothing_legal(options, closest, replicas=replicas, certain=certain)
    fastest = min(options.legal, key=lambda option: option.capacity.prediction.tpot_ms)
    if not fastest.capacity.broken_promise:
        return no_memory_to_spare(fastest, options)
    slower = []
    for option in _quickest(options):
        free = room.beside(model, option)
        replicas = min(options.wish.replicas.max, places_for(option, free))
        found = slower_level(option, options.wish, replicas, certain=certain)
        slower.append(replace(found, option=room.with_spare(found.option)))
    least = min(each.factor for each in slower)

    def rank(each: Slower) -> tuple[bool, tuple[bool, float], float]:
        beyond, price, *_ = _effort(room, model, each.option)
        return each.factor > 2 * least, (beyond, price), each.factor

    best = min(slower, key=rank)
    free = room.beside(model, best.option)
    room.reserve(model, best.option, wanted_replicas(best.option, options))
    return too_slow(fastest, best, options, free)


def _quickest(options: Options) -> list[Option]:
    """A few, among them those that write fastest and those that read fastest."""
    writing = sorted(options.legal, key=lambda option: option.capacity.prediction.tpot_ms)
    reading = sorted(options.legal, key=lambda option: option.capacity.prediction.ttft_s)
    found = {id(option): option for pair in zip(writing, reading, strict=True) for option in pair}
    return list(found.values())[:_MOST_TRIED]


def _out_of_room(room: _Room, model: int, usable: Sequence[Option]) -> Unmet:
    """GPUs are missing, or `replicas.max` is too low, or both."""
    options = room.question.options[model]
    best = _least_effort(room, model, usable)
    entry = out_of_room(best, options, room.beside(model, best))
    room.reserve(model, best, wanted_replicas(best, options))
    return entry


def _least_effort(room: _Room, model: int, usable: Sequence[Option]) -> Option:
    return min(usable, key=lambda option: _effort(room, model, option))


def _effort(room: _Room, model: int, option: Option) -> tuple[bool, float, int, float]:
    """What a way out by this option takes: a higher limit, the price of more GPUs, their number."""
    wish = room.question.options[model].wish
    replicas = wanted_replicas(option, room.question.options[model])
    missing = missing_gpus(option, replicas, room.beside(model, option))
    price = sum(gpus * part.price_per_gpu_hour for part, gpus in missing)
    beyond = replicas > wish.replicas.max
    return beyond, price, sum(gpus for _, gpus in missing), replicas * option.price_per_replica
