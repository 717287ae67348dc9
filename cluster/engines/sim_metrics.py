"""The simulated engine's metrics, under vLLM's names."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.engines.sim_batch import Batch

_TTFT_BUCKETS_S = (  # vLLM's
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)


class Metrics:
    """Counters under vLLM's names."""

    def __init__(self, model: str, batch: Batch) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._gauge("num_requests_running", lambda: len(batch.running))
        self._gauge("num_requests_waiting", lambda: len(batch.waiting))
        self._gauge("kv_cache_usage_perc", lambda: batch.kv_cache_usage)
        names = tuple(self._labels)
        counted = [
            Counter(f"vllm:{name}", name, names, registry=self._registry).labels(**self._labels)
            for name in ("prompt_tokens", "generation_tokens")
        ]
        self.prompt_tokens, self.generation_tokens = counted
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "time_to_first_token",
            names,
            registry=self._registry,
            buckets=_TTFT_BUCKETS_S,
        ).labels(**self._labels)

        self._intervals = (0, 0.0)  # between tokens: how many, and their seconds
        # Together as vLLM's histogram without its buckets; a step of a full batch has hundreds.
        self._gauge("inter_token_latency_seconds_count", lambda: self._intervals[0])
        self._gauge("inter_token_latency_seconds_sum", lambda: self._intervals[1])

    def intervals(self, number: int, seconds: float) -> None:
        """As many requests got a token, `seconds` after their last one."""
        count, total = self._intervals
        self._intervals = (count + number, total + number * seconds)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, value: Callable[[], float]) -> None:
        gauge = Gauge(f"vllm:{name}", name, tuple(self._labels), registry=self._registry)
        gauge.labels(**self._labels).set_function(value)
