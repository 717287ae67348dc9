"""How long each stage of a pipeline takes with which layers, and for how many it has memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from placement.candidate import Candidate, Device
from placement.capacity import DEFAULT_DEMAND
from placement.costs import ReplicaSpeed, StageSpeed
from placement.fleet import FleetModel
from placement.layer_split import Times
from placement.memory import stage_memory
from placement.performance import prompt_cost, stage_s
from placement.pipeline import Stage


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Of each stage. Prompts have a slowest stage of their own, which need not be that of answers."""

    whole: list[Times]  # prompt and answer
    answer: list[Times]


class StageMemories:
    """How many layers stages hold beside a cache; each kind of stage is looked at once."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        moe = candidate.architecture.moe
        self._dense = 0 if moe is None else moe.num_dense_layers
        self._most: dict[tuple[Device, bool, bool, int, int], int] = {}

    @property
    def settled(self) -> int:
        """The layer from which on it no longer matters which is a stage's first."""
        return max(1, self._dense)

    def most_layers(
        self, device: Device, cache_tokens: int, *, first: int, is_last: bool = False
    ) -> int:
        """From layer `first` on, beside a cache of so many tokens; more layers never need less."""
        dense = min(first, self._dense)  # layers before it that are unlike the others
        key = (device, first == 0, is_last, dense, cache_tokens)
        if key not in self._most:
            low, high = 0, self._candidate.architecture.num_layers
            while low < high:
                middle = (low + high + 1) // 2
                stage = Stage(0, first, middle, is_first=first == 0, is_last=is_last)
                if self._cache_tokens(device, stage) >= cache_tokens:
                    low = middle
                else:
                    high = middle - 1
            self._most[key] = low
        return self._most[key]

    def _cache_tokens(self, device: Device, stage: Stage) -> int:
        """That the stage's cache holds beside its layers; 0: not even they fit."""
        ranks = self._candidate.tensor_parallel_size
        memory = stage_memory(replace(self._candidate, rank_devices=(device,) * ranks), stage)
        return 0 if memory.missing_bytes else memory.kv.tokens


def stage_times(
    wish: FleetModel,
    candidate: Candidate,
    speed: ReplicaSpeed,
    memories: StageMemories,
    *,
    requests: int,
    cache_tokens: int,
) -> StageTimes:
    """Seconds that a request takes of each stage, when `requests` are under way in all of them.

    Infinite where layers do not fit beside a cache of `cache_tokens`. Stages that are alike have
    one array.
    """
    layers, last = speed.architecture.num_layers, len(speed.stages) - 1
    found: dict[tuple[Device, float, float, bool], tuple[Times, Times]] = {}
    times = []
    for index, stage in enumerate(speed.stages):
        device = candidate.stage_devices(index)[0]
        key = (device, stage.send.latency_s, stage.send.s_per_byte, index == last)
        if key not in found:
            none, every = (_seconds(wish, stage, share, requests, last + 1) for share in (0.0, 1.0))
            most = [
                memories.most_layers(device, cache_tokens, first=first, is_last=index == last)
                for first in range(memories.settled + 1)
            ]
            whole, answer = (
                _by_layers(layers, fixed, (full - fixed) / layers, most)
                for fixed, full in zip(none, every, strict=True)
            )
            found[key] = whole, answer
        times.append(found[key])
    return StageTimes([whole for whole, _ in times], [answer for _, answer in times])


def _by_layers(layers: int, fixed_s: float, layer_s: float, most: list[int]) -> Times:
    """`most`: layers that fit from the first, the second ... layer on; from the last of them, all."""
    ends = np.arange(layers + 1)
    held = ends - ends[:, np.newaxis]
    at_most = np.array(most)[np.minimum(ends, len(most) - 1)]
    fits = (held > 0) & (held <= at_most[:, np.newaxis])
    return np.where(fits, fixed_s + layer_s * held, np.inf)


def _seconds(
    wish: FleetModel, stage: StageSpeed, share: float, requests: int, num_stages: int
) -> tuple[float, float]:
    """Of a stage with a share of all layers, one of so many requests: all of it, its answer."""
    demand, part = wish.demand or DEFAULT_DEMAND, replace(stage, share=share)
    batch = max(1.0, requests / num_stages)
    context = demand.input_tokens.mean + demand.output_tokens.mean / 2
    decode = stage_s(part, batch=batch, context=context) / batch
    prompt = prompt_cost(stage.speed, demand.input_tokens.mean, prefix_hit=demand.prefix_hit)
    answer = demand.output_tokens.mean * decode
    return share * prompt.work_s + answer, answer
