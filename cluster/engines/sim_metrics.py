"""The simulated engine's metrics, under vLLM's names.

Data-parallel copies have gauges each: the one batch that stands for all is shared out evenly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.engines.adapter import EngineLoad
from cluster.engines.sim_batch import Batch
from placement.speed_window import EngineCounters

_TTFT_BUCKETS_S = (  # vLLM's
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)


class Metrics:
    """Counters under vLLM's names."""

    def __init__(self, model: str, batch: Batch, copies: int = 1) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._batch = batch
        self._copies = copies
        self._gauge("num_requests_running", lambda copy: self._share(len(batch.running), copy))
        self._gauge("num_requests_waiting", lambda copy: self._share(len(batch.waiting), copy))
        self._gauge("kv_cache_usage_perc", lambda _: batch.kv_cache_usage)
        names = tuple(self._labels)
        counted = [
            Counter(f"vllm:{name}", name, names, registry=self._registry).labels(**self._labels)
            for name in ("prompt_tokens", "generation_tokens")
        ]
        self._prompt_tokens, self.generation_tokens = counted
        self._time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "time_to_first_token",
            names,
            registry=self._registry,
            buckets=_TTFT_BUCKETS_S,
        ).labels(**self._labels)

        self._begun = (0, 0.0, 0)  # answers: how many, their seconds until then, tokens of prompts
        self._intervals = (0, 0.0)  # between tokens: how many, and their seconds
        # Together as vLLM's histogram without its buckets; a step of a full batch has hundreds.
        self._gauge(
            "inter_token_latency_seconds_count", lambda copy: self._share(self._intervals[0], copy)
        )
        self._gauge("inter_token_latency_seconds_sum", lambda _: self._intervals[1] / copies)

    def first_token(self, prompt_tokens: int, seconds: float) -> None:
        """An answer has begun, `seconds` after its request came."""
        self._time_to_first_token.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)
        count, total_s, tokens = self._begun
        self._begun = (count + 1, total_s + seconds, tokens + prompt_tokens)

    def intervals(self, number: int, seconds: float) -> None:
        """As many requests got a token, `seconds` after their last one."""
        count, total = self._intervals
        self._intervals = (count + number, total + number * seconds)

    def load(self) -> EngineLoad:
        """What a reader of `text` finds there. Making and reading the page takes milliseconds."""
        prompts, ttft_s, prompt_tokens = self._begun
        intervals, intervals_s = self._intervals
        return EngineLoad(
            running=len(self._batch.running),
            waiting=len(self._batch.waiting),
            kv_cache_usage=self._batch.kv_cache_usage,
            counters=EngineCounters(
                prompts=prompts,
                ttft_s=ttft_s,
                prompt_tokens=prompt_tokens,
                cached_tokens=0,
                intervals=intervals,
                intervals_s=intervals_s,
            ),
        )

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, value: Callable[[int], float]) -> None:
        gauge = Gauge(f"vllm:{name}", name, tuple(self._labels), registry=self._registry)
        for copy in range(self._copies):
            labels = {**self._labels, "engine": str(copy)}
            gauge.labels(**labels).set_function(functools.partial(value, copy))

    def _share(self, requests: int, copy: int) -> int:
        return requests // self._copies + (copy < requests % self._copies)
