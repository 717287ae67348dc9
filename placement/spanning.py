"""Replicas whose pipeline stages stand on two nodes, alike or not: for models that outgrow a node.

Tensor-parallel groups stay inside a node and are of one size everywhere (vLLM has one), so a node
gives a whole number of stages. The layers are split by dynamic programming (`layer_split`): the
slowest stage, head included, is as fast as it can be while each stage has memory for its layers and
for a cache of so many tokens. A larger cache asks for another split, so several are tried, and the
one that carries most stays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from placement.candidate import Candidate, Device, device_of
from placement.candidates import (
    filled_in,
    longest_request,
    wanted_checkpoints,
    with_context_that_fits,
)
from placement.capacity import DEFAULT_DEMAND
from placement.catalogue import Catalogue, Checkpoint, ModelSpec
from placement.costs import ReplicaSpeed, StageSpeed
from placement.fleet import FleetModel
from placement.inventory import Pool
from placement.layer_split import Cost, split_layers
from placement.legality import first_rejection
from placement.memory import stage_memory
from placement.option import carried
from placement.performance import prompt_cost, replica_speed, stage_s
from placement.pipeline import Stage
from placement.plan import Rejection
from placement.replica_speed import recut
from placement.weight_bytes import checkpoint_bytes

_REQUESTS = (1, 8, 64)  # that the cache should hold, of the demand's mean lengths
_ROOMY = 1.5  # times the checkpoint: with such memory on fewer GPUs, more are not looked at
_MEMORY_RULES = frozenset({"weights-exceed-memory", "kv-cache-below-one-request"})


@dataclass(frozen=True, slots=True)
class Nodes:
    """GPUs of one node of a pool."""

    pool: Pool
    device: Device
    gpus: int


@dataclass(frozen=True, slots=True)
class Spanning:
    """A candidate over two nodes, and the rule that it breaks, if any."""

    candidate: Candidate
    nodes: tuple[Nodes, Nodes]  # in the order of the stages
    rejection: Rejection | None


def spanning_candidates(
    wish: FleetModel, pools: tuple[Pool, Pool], catalogue: Catalogue
) -> Iterator[Spanning]:
    """Ways to run the model on a node of each of two pools, or on two nodes of one.

    For each checkpoint the sets of GPUs that just hold it, or all of both nodes; the best order of
    the nodes and split of the layers for each. Of those that are not possible, the one that came
    closest.
    """
    model = catalogue.model(wish.model)
    devices = tuple(device_of(pool, catalogue.gpu(pool.gpu)) for pool in pools)
    if not model.supports_pipeline_parallel or not all(map(_is_gpu_with_known_memory, devices)):
        return
    for checkpoint in wanted_checkpoints(wish, model):
        if checkpoint.format == "gguf":
            continue
        ranks = wish.tensor_parallel_size or 1
        for gpus in _sizes(model, checkpoint, devices, ranks, alike=pools[0] == pools[1]):
            nodes = tuple(map(Nodes, pools, devices, gpus))
            yield from _best_of(wish, model, checkpoint, (nodes[0], nodes[1]), catalogue)


def _is_gpu_with_known_memory(device: Device) -> bool:
    return not device.is_cpu and device.memory_bytes is not None


def _sizes(
    model: ModelSpec,
    checkpoint: Checkpoint,
    devices: Sequence[Device],
    ranks: int,
    *,
    alike: bool,
) -> list[tuple[int, int]]:
    """How many GPUs of each node to look at, in groups of `ranks`; of nodes that are alike, all."""
    full = tuple(device.gpus_per_node for device in devices)
    if alike:
        return [(full[0], full[1])] if full[0] % ranks == 0 else []
    choices = [
        [
            n
            for n in sorted({*(1 << power for power in range(size.bit_length())), size})
            if n % ranks == 0
        ]
        for size in full
    ]
    needed = checkpoint_bytes(model.architecture, checkpoint)

    def memory(gpus: Sequence[int]) -> float:
        return sum(n * (d.memory_bytes or 0) for n, d in zip(gpus, devices, strict=True))

    enough = [pair for pair in itertools.product(*choices) if memory(pair) >= needed]
    if not enough and all(choices):
        enough = [(choices[0][-1], choices[1][-1])]  # to say what is missing
    return [
        (pair[0], pair[1])
        for pair in enough
        if not any(
            other != pair
            and all(fewer <= more for fewer, more in zip(other, pair, strict=True))
            and memory(other) >= _ROOMY * needed
            for other in enough
        )
    ]


def _best_of(
    wish: FleetModel,
    model: ModelSpec,
    checkpoint: Checkpoint,
    nodes: tuple[Nodes, Nodes],
    catalogue: Catalogue,
) -> Iterator[Spanning]:
    """Over tensor parallel sizes and orders, what carries most; else what came closest."""
    best: tuple[float, Spanning] | None = None
    closest: Spanning | None = None
    orders = [nodes] if nodes[0].device == nodes[1].device else [nodes, nodes[::-1]]
    for order, ranks in itertools.product(orders, _tensor_sizes(wish, nodes)):
        candidate = _uncut(wish, model, checkpoint, order, ranks)
        candidate = replace(candidate, calibration=catalogue.calibration)
        rejection = first_rejection(candidate)
        if rejection is not None and rejection.rule not in _MEMORY_RULES:
            closest = closest or Spanning(candidate, order, rejection)
            continue
        speed = replica_speed(candidate)
        for cut in _cut(wish, candidate, speed):
            rejection = first_rejection(cut)
            if rejection is not None:
                continue
            rate = carried(wish, cut, recut(speed, cut), wish.slo).requests_per_s
            if best is None or rate > best[0] * (1 + 1e-9):
                best = rate, Spanning(cut, order, None)
        closest = closest or Spanning(candidate, order, first_rejection(candidate))
    if best is not None:
        yield best[1]
    elif closest is not None and closest.rejection is not None:
        yield closest


def _tensor_sizes(wish: FleetModel, nodes: Sequence[Nodes]) -> list[int]:
    """The largest power of two that both numbers of GPUs are a multiple of; without NVLink, half."""
    if wish.tensor_parallel_size is not None:
        return [wish.tensor_parallel_size]
    common = math.gcd(*(each.gpus for each in nodes))
    largest = common & -common
    slow = any(each.device.link != "nvlink" for each in nodes)
    return [largest, largest // 2] if slow and largest > 1 else [largest]


def _uncut(
    wish: FleetModel,
    model: ModelSpec,
    checkpoint: Checkpoint,
    nodes: Sequence[Nodes],
    ranks: int,
) -> Candidate:
    """The candidate before its layers are split."""
    stages = [each.gpus // ranks for each in nodes]
    entries = math.gcd(*(each.gpus for each in nodes))  # ranks of each process tree
    return replace(
        filled_in(wish, model, checkpoint, nodes[0].device, ranks),
        num_nodes=sum(each.gpus for each in nodes) // entries,
        pipeline_parallel_size=sum(stages),
        rank_devices=tuple(each.device for each in nodes for _ in range(each.gpus)),
        stage_nodes=tuple(at for at, count in enumerate(stages) for _ in range(count)),
    )


def _cut(wish: FleetModel, candidate: Candidate, speed: ReplicaSpeed) -> Iterator[Candidate]:
    """The candidate with each split that some size of the cache asks for."""
    demand = wish.demand or DEFAULT_DEMAND
    each = demand.input_tokens.mean + demand.output_tokens.mean
    least = wish.max_model_len or longest_request(wish)
    layers, stages = candidate.architecture.num_layers, candidate.pipeline_parallel_size
    memories = StageMemories(candidate)
    seen = set()
    for requests in _REQUESTS:
        if requests > candidate.max_num_seqs:
            break
        tokens = max(least, math.ceil(requests * each))
        cost = stage_costs(wish, speed, memories, requests=requests, cache_tokens=tokens)
        partition = split_layers(layers, stages, cost)
        if partition is None:
            return
        if partition in seen:
            continue
        seen.add(partition)
        cut = replace(candidate, layer_partition=partition)
        yield cut if wish.max_model_len else with_context_that_fits(cut, at_least=least)


class StageMemories:
    """How many layers stages hold beside a cache; each kind of stage is looked at once."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        moe = candidate.architecture.moe
        self._dense = 0 if moe is None else moe.num_dense_layers
        self._most: dict[tuple[int, ...], int] = {}

    def most_layers(self, stage: int, first: int, cache_tokens: int) -> int:
        """From layer `first` on, beside a cache of so many tokens; more layers never need less."""
        candidate = self._candidate
        last = candidate.pipeline_parallel_size - 1
        dense = min(first, self._dense)  # layers before it that are unlike the others
        node = candidate.stage_nodes[stage]
        key = (node, int(stage == 0), int(stage == last), dense, cache_tokens)
        if key not in self._most:
            low, high = 0, candidate.architecture.num_layers
            while low < high:
                middle = (low + high + 1) // 2
                if self._cache_tokens(stage, first, middle) >= cache_tokens:
                    low = middle
                else:
                    high = middle - 1
            self._most[key] = low
        return self._most[key]

    def _cache_tokens(self, stage: int, first: int, num_layers: int) -> int:
        """That the stage's cache holds beside these layers; 0: not even they fit."""
        layers = Stage(
            index=stage,
            first_layer=first,
            num_layers=num_layers,
            is_first=stage == 0,
            is_last=stage == self._candidate.pipeline_parallel_size - 1,
        )
        memory = stage_memory(self._candidate, layers)
        return 0 if memory.missing_bytes else memory.kv.tokens


def stage_costs(
    wish: FleetModel,
    speed: ReplicaSpeed,
    memories: StageMemories,
    *,
    requests: int,
    cache_tokens: int,
) -> Cost:
    """Seconds that a request takes of a stage, when `requests` are under way in all of them."""
    demand, layers = wish.demand or DEFAULT_DEMAND, speed.architecture.num_layers
    batch, stages = max(1.0, requests / speed.pipeline_parallel_size), speed.stages

    def seconds(stage: StageSpeed, share: float) -> float:
        part = replace(stage, share=share)
        context = demand.input_tokens.mean + demand.output_tokens.mean / 2
        decode = stage_s(part, batch=batch, context=context) / batch
        prompt = prompt_cost(stage.speed, demand.input_tokens.mean, prefix_hit=demand.prefix_hit)
        return share * prompt.work_s + demand.output_tokens.mean * decode

    fixed = [seconds(stage, 0.0) for stage in stages]
    all_layers = [seconds(stage, 1.0) - none for stage, none in zip(stages, fixed, strict=True)]

    def cost(stage: int, first: int, end: int) -> float:
        if end - first > memories.most_layers(stage, first, cache_tokens):
            return math.inf
        return fixed[stage] + all_layers[stage] * (end - first) / layers

    return cost
