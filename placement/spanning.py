"""Replicas whose pipeline stages stand on several nodes, alike or not: for models that outgrow a node.

Tensor-parallel groups stay inside a node and are of one size everywhere (vLLM has one), so a node
gives a whole number of stages. For each set of nodes (`node_sets`) the nodes are put in order, and
the layers split by dynamic programming (`layer_split`): the slowest stage, head included, is as fast
as it can be while each stage has memory for its layers and for a cache of so many tokens. A larger
cache asks for another split, so several are tried, and what carries most stays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from placement.candidate import Candidate, Device, device_of
from placement.candidates import (
    CONTEXT_STEP,
    filled_in,
    longest_request,
    wanted_checkpoints,
    with_context_that_fits,
)
from placement.capacity import DEFAULT_DEMAND
from placement.catalogue import Catalogue, Checkpoint, ModelSpec
from placement.costs import ReplicaSpeed
from placement.fleet import FleetModel
from placement.inventory import Pool
from placement.layer_split import slowest_s, split_layers
from placement.legality import first_rejection
from placement.node_orders import Nodes, orders
from placement.node_sets import MOST_NODES, Kind, NodeSet, NodeSets, sizes_of, worth_a_look
from placement.option import carried
from placement.plan import Rejection
from placement.replica_speed import recut, spanning_speed, speed_alone
from placement.stage_times import StageMemories, StageTimes, stage_times

_REQUESTS = (1, 8, 64, 256)  # that the cache should hold, of the demand's mean lengths
_MOST_ORDERS, _OF_MANY = 4, 2  # of the nodes that are looked at closely; of more, the fastest
_MEMORY_RULES = frozenset({"weights-exceed-memory", "kv-cache-below-one-request"})


@dataclass(frozen=True, slots=True)
class Spanning:
    """A candidate over several nodes, and the rule that it breaks, if any."""

    candidate: Candidate
    nodes: tuple[Nodes, ...]  # in the order of the stages
    rejection: Rejection | None


@dataclass(frozen=True, slots=True)
class Spans:
    """What was found over several nodes, and what was not even looked at."""

    found: tuple[Spanning, ...] = ()
    left_out: tuple[Rejection, ...] = ()


def spanning_candidates(
    wish: FleetModel, places: Sequence[tuple[Pool, int]], catalogue: Catalogue
) -> Spans:
    """Ways to run the model on several nodes of `places`: pools, and how many nodes each has.

    For each checkpoint the sets of nodes that just hold it, and somewhat roomier ones; for each the
    best order of the nodes and split of the layers. Of those that are not possible, what came
    closest.
    """
    model = catalogue.model(wish.model)
    kinds = [
        (pool, device_of(pool, catalogue.gpu(pool.gpu)), nodes) for pool, nodes in places if nodes
    ]
    kinds = [kind for kind in kinds if _is_gpu_with_known_memory(kind[1])]
    if not model.supports_pipeline_parallel or not kinds:
        return Spans()
    found: list[Spanning] = []
    left_out: list[Rejection] = []
    for checkpoint in wanted_checkpoints(wish, model):
        if checkpoint.format != "gguf":
            search = _Search(wish, model, checkpoint, catalogue, kinds)
            found += search.best_of_each_set()
            left_out += search.left_out
    return Spans(tuple(found), tuple(left_out))


def _is_gpu_with_known_memory(device: Device) -> bool:
    return not device.is_cpu and device.memory_bytes is not None


@dataclass(slots=True)
class _Search:
    """For one checkpoint of a model; what many sets of nodes ask for is worked out once."""

    wish: FleetModel
    model: ModelSpec
    checkpoint: Checkpoint
    catalogue: Catalogue
    kinds: Sequence[tuple[Pool, Device, int]]
    left_out: list[Rejection] = field(default_factory=list)
    _alone: dict[tuple[Device, int], ReplicaSpeed] = field(default_factory=dict)
    _memories: dict[tuple[Device, int, int], StageMemories] = field(default_factory=dict)

    def best_of_each_set(self) -> Iterator[Spanning]:
        """Of each set of nodes that is worth a look; one that holds nothing tells why."""
        ranks = self.wish.tensor_parallel_size or 1
        kinds = [Kind(nodes, sizes_of(pool.gpus_per_node, ranks)) for pool, _, nodes in self.kinds]
        sets = worth_a_look(kinds, self._room)
        for each in sets.sets:
            best = self._best_of(each)
            if best is not None:
                yield best
        if sets.left_out or not sets.all_tried:
            self.left_out.append(_untried(self.checkpoint, sets))

    def _room(self, taken: NodeSet) -> float:
        """How many times the set has memory for the layers beside the smallest cache, at best."""
        architecture = self.model.architecture
        light = 0 if architecture.moe is None else architecture.moe.num_dense_layers
        held = max(self._layers_held(taken, ranks) for ranks in self._tensor_sizes(taken))
        return held / max(1, architecture.num_layers - light)

    def _layers_held(self, taken: NodeSet, ranks: int) -> int:
        """Without those whose room embedding and head take, where they take least."""
        held = 0
        embedding, head = [], []
        for (_, device, _), mine in zip(self.kinds, taken, strict=True):
            if not mine:
                continue
            memories = self._memories_of(device, ranks, stages=2)
            most, settled = memories.most_layers, memories.settled
            each = most(device, self._least_tokens, first=settled)
            held += each * (sum(mine) // ranks)
            embedding.append(each - most(device, self._least_tokens, first=0))
            head.append(each - most(device, self._least_tokens, first=settled, is_last=True))
        return held - max(0, min(embedding)) - max(0, min(head))

    @property
    def _least_tokens(self) -> int:
        """Of the cache: one request of the context that is wanted, and the block that vLLM keeps."""
        if self.wish.max_model_len:
            return self.wish.max_model_len + 1
        return -(-longest_request(self.wish) // CONTEXT_STEP) * CONTEXT_STEP + 1

    def _tensor_sizes(self, taken: NodeSet) -> list[int]:
        """The largest power of two that all numbers of GPUs share; without NVLink, half of it too."""
        if self.wish.tensor_parallel_size is not None:
            return [self.wish.tensor_parallel_size]
        common = math.gcd(*itertools.chain(*taken))
        largest = common & -common
        used = (device for (_, device, _), mine in zip(self.kinds, taken, strict=True) if mine)
        slow = any(device.link != "nvlink" for device in used)
        return [largest, largest // 2] if slow and largest > 1 else [largest]

    def _best_of(self, taken: NodeSet) -> Spanning | None:
        """Over tensor parallel sizes and orders, what carries most; else what came closest."""
        nodes = tuple(
            Nodes(pool, device, gpus)
            for (pool, device, _), mine in zip(self.kinds, taken, strict=True)
            for gpus in mine
        )
        best: tuple[float, Spanning] | None = None
        closest: Spanning | None = None
        for ranks in self._tensor_sizes(taken):
            uncut = self._uncut(nodes, ranks)
            rejection = first_rejection(uncut)
            closest = closest or Spanning(uncut, nodes, rejection)
            if rejection is not None and rejection.rule not in _MEMORY_RULES:
                continue
            for order, candidate, speed in self._fastest_orders(nodes, ranks):
                for cut in self._cut(candidate, speed):
                    rate = self._rate(cut, speed)
                    if best is None or rate > best[0] * (1 + 1e-9):
                        best = rate, Spanning(cut, order, None)
        if best is not None:
            return best[1]
        return closest if closest is not None and closest.rejection is not None else None

    def _rate(self, cut: Candidate, speed: ReplicaSpeed) -> float:
        return carried(self.wish, cut, recut(speed, cut), self.wish.slo).requests_per_s

    def _uncut(self, nodes: Sequence[Nodes], ranks: int) -> Candidate:
        """The candidate before its layers are split."""
        stages = [each.gpus // ranks for each in nodes]
        entries = math.gcd(*(each.gpus for each in nodes))  # ranks of each process tree
        return replace(
            filled_in(self.wish, self.model, self.checkpoint, nodes[0].device, ranks),
            num_nodes=sum(each.gpus for each in nodes) // entries,
            pipeline_parallel_size=sum(stages),
            rank_devices=tuple(each.device for each in nodes for _ in range(each.gpus)),
            stage_nodes=tuple(at for at, count in enumerate(stages) for _ in range(count)),
            calibration=self.catalogue.calibration,
        )

    def _fastest_orders(
        self, nodes: Sequence[Nodes], ranks: int
    ) -> list[tuple[tuple[Nodes, ...], Candidate, ReplicaSpeed]]:
        """The orders of the nodes whose slowest stage is fastest, with the fewest requests."""
        found = []
        for order in orders(nodes):
            candidate = self._uncut(order, ranks)
            speed = spanning_speed(candidate, self._speeds_alone(candidate))
            times = self._times(candidate, speed, 1)
            split = split_layers(times.whole)
            if split is not None:
                found.append((slowest_s(times.whole, split), order, candidate, speed))
        found.sort(key=lambda each: each[0])
        closely = len(found) if len(found) <= _MOST_ORDERS else _OF_MANY
        return [each[1:] for each in found[:closely]]

    def _speeds_alone(self, candidate: Candidate) -> dict[Device, ReplicaSpeed]:
        ranks = candidate.tensor_parallel_size
        devices = dict.fromkeys(candidate.rank_devices)
        for device in devices:
            if (device, ranks) not in self._alone:
                self._alone[device, ranks] = speed_alone(candidate, device)
        return {device: self._alone[device, ranks] for device in devices}

    def _cut(self, candidate: Candidate, speed: ReplicaSpeed) -> Iterator[Candidate]:
        """The candidate with each split that some size of the cache asks for, as far as legal."""
        for partition in dict.fromkeys(self._splits(candidate, speed)):
            cut = replace(candidate, layer_partition=partition)
            if not self.wish.max_model_len:
                cut = with_context_that_fits(cut, at_least=longest_request(self.wish))
            if first_rejection(cut) is None:
                yield cut

    def _splits(self, candidate: Candidate, speed: ReplicaSpeed) -> Iterator[tuple[int, ...]]:
        """The fastest for caches of different sizes, up to the largest that there is room for."""
        fits, too_many = 0, 0
        for requests in _REQUESTS:
            splits = self._fastest(candidate, speed, min(requests, candidate.max_num_seqs))
            if not splits:
                too_many = requests
                break
            yield from splits
            fits = requests
        largest: tuple[tuple[int, ...], ...] = ()
        while fits and too_many - fits > 1 + fits // 3:
            requests = (fits + too_many) // 2
            splits = self._fastest(candidate, speed, requests)
            if splits:
                fits, largest = requests, splits
            else:
                too_many = requests
        yield from largest

    def _fastest(
        self, candidate: Candidate, speed: ReplicaSpeed, requests: int
    ) -> tuple[tuple[int, ...], ...]:
        """Splits with the fastest slowest stage: for prompt and answer together, for answers."""
        times = self._times(candidate, speed, requests)
        splits = (
            split_layers(times.whole, times.answer),
            split_layers(times.answer, times.whole),
        )
        return tuple(split for split in splits if split is not None)

    def _times(self, candidate: Candidate, speed: ReplicaSpeed, requests: int) -> StageTimes:
        demand = self.wish.demand or DEFAULT_DEMAND
        each = demand.input_tokens.mean + demand.output_tokens.mean
        memories = self._memories_of(
            candidate.device, candidate.tensor_parallel_size, candidate.pipeline_parallel_size
        )
        return stage_times(
            self.wish,
            candidate,
            speed,
            memories,
            requests=requests,
            cache_tokens=max(self._least_tokens, math.ceil(requests * each)),
        )

    def _memories_of(self, device: Device, ranks: int, stages: int) -> StageMemories:
        key = (device, ranks, stages)
        if key not in self._memories:
            candidate = filled_in(self.wish, self.model, self.checkpoint, device, ranks)
            self._memories[key] = StageMemories(
                replace(
                    candidate,
                    pipeline_parallel_size=stages,
                    calibration=self.catalogue.calibration,
                )
            )
        return self._memories[key]


def _untried(checkpoint: Checkpoint, sets: NodeSets) -> Rejection:
    """Says that the search was cut."""
    looked = len(sets.sets)
    reason = f"{looked} sets of at most {MOST_NODES} nodes were looked at, those of few kinds first"
    if sets.left_out:
        reason += f"; {sets.left_out} more may hold the model too"
    if not sets.all_tried:
        reason += "; those of many kinds were not counted"
    return Rejection(
        shape={"precision": checkpoint.precision}, rule="node-sets-left-out", reason=reason
    )
