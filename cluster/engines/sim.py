"""Adapter of the simulated engine: a Variant's predicted speed becomes flags of `sim_server`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.engines import vllm_output
from cluster.engines.adapter import (
    MEETING,
    EngineFacts,
    EngineLoad,
    Launch,
    Rank,
    side_channel,
)
from placement.plan import Shape, Variant

_OWN_FLAG = "--sim-"
_SERVER, _GANG = "cluster.engines.sim_server", "cluster.engines.sim_gang"
_INSIDE = "--sim-inside"
_TRANSFER_BYTES_PER_S = 12.5e9  # 100 Gb/s

_STAGES = {
    "distributed_init_method=tcp": MEETING,
    "Starting to load model": "loading weights",
    "GPU KV cache size": "starting the server",
    "Application startup complete": "ready",
}


@dataclass(frozen=True, slots=True)
class SimEngine:
    """Starts `cluster.engines.sim_server`, which needs neither weights nor a GPU.

    `reference_input_tokens` is the prompt length that `shape.prediction.ttft_s` was made for.
    Of `shape.engine_args` it takes what begins with `--sim-`, without that prefix: `--sim-speed 20`
    is the server's `--speed 20`. The others are flags of the engine that is simulated.
    With `--sim-inside` no process is started: the replica's own one simulates (`sim_inside`).
    """

    reference_input_tokens: int = 512

    @property
    def load_paths(self) -> tuple[str, ...]:
        """Where the load is told."""
        return ("/metrics",)

    def launch(
        self, variant: Variant, *, checkpoint: Path | str, host: str, port: int, api_key: str
    ) -> Launch:
        """Command and environment; there is nothing to load, so `checkpoint` is not looked at."""
        del checkpoint
        shape = variant.shape
        flags = {
            "model": variant.model,
            "host": host,
            "port": port,
            "max-model-len": shape.max_model_len,
            # vLLM's limits are of one data-parallel rank; one batch here stands for all of them.
            "max-num-seqs": shape.request_slots,
            "max-num-batched-tokens": shape.max_num_batched_tokens * shape.data_parallel_size,
            "kv-cache-tokens": shape.kv_cache_tokens,
            "weights-bytes": max(shape.per_gpu.weights_bytes, 1),
            "prefill-tokens-per-s": prefill_tokens_per_s(shape, self.reference_input_tokens),
            "tpot-ms": tpot_ms(shape, 1, self.reference_input_tokens),
            "tpot-ms-at-max": tpot_ms(shape, shape.request_slots, self.reference_input_tokens),
            "data-parallel-size": shape.data_parallel_size,
        }
        command = [sys.executable, "-m", _SERVER]
        for name, value in flags.items():
            command += [f"--{name}", f"{value:.6g}" if isinstance(value, float) else str(value)]
        command += _adapter_flags(shape.engine_args)
        command += _transfer_flags(shape)
        command += _own_flags(shape.engine_args)
        key = {"VLLM_API_KEY": api_key} if api_key else {}
        return Launch(tuple(command), key | side_channel(variant, host, port))

    def ranked(self, launch: Launch, rank: Rank) -> Launch:
        """A node's share: it meets the others before it serves."""
        own = ["--node-rank", str(rank.node_rank), "--num-nodes", str(rank.num_nodes)]
        own += ["--master-addr", rank.master_host, "--master-port", str(rank.master_port), "--"]
        server = launch.command.index(_SERVER)
        command = (*launch.command[:server], _GANG, *own, *launch.command[server + 1 :])
        return Launch(command, launch.env)

    def stage(self, log_line: str) -> str | None:
        """What the engine is doing, if this line of its log tells."""
        return next((stage for sign, stage in _STAGES.items() if sign in log_line), None)

    def facts(self, log: str) -> EngineFacts:
        """What the log tells about memory."""
        return vllm_output.facts(log)

    def load(self, *pages: str) -> EngineLoad:
        """Parse the text of the engine's `/metrics`."""
        return vllm_output.load(pages[0])

    def expert_balance(self, log: str) -> float | None:
        """Mean load of ranks over the largest, 0..1, if these lines of the log tell (EPLB)."""
        return vllm_output.expert_balance(log)


def tpot_ms(shape: Shape, num_requests: int, context_tokens: int) -> float:
    """Time of a decode step with `num_requests` requests of `context_tokens`, milliseconds.

    The prediction is one point of it: `prediction.tpot_ms`, at as many requests as that speed
    needs for `prediction.output_tokens_per_s`. From there it follows the bytes that a rank reads in
    a step, weights + requests x context x KV bytes per token, a straight line in the requests.
    """
    prediction = shape.prediction
    max_requests = shape.request_slots
    predicted_at = prediction.output_tokens_per_s * prediction.tpot_ms / 1000
    predicted_at = min(max(predicted_at, 1.0), max_requests)

    def step_bytes(requests: float) -> float:
        kv_bytes = requests / shape.data_parallel_size * context_tokens * shape.kv_bytes_per_token
        return shape.per_gpu.weights_bytes + kv_bytes

    scale = step_bytes(num_requests) / step_bytes(predicted_at) if step_bytes(1) else 1.0
    return max(prediction.tpot_ms * scale, 0.001)


def prefill_tokens_per_s(shape: Shape, reference_input_tokens: int) -> float:
    """Prompt tokens a second at which `reference_input_tokens` take `prediction.ttft_s`.

    The simulator's first token costs a decode step beside its prefill, so that much is subtracted,
    but never more than nine tenths.
    """
    ttft_s = max(shape.prediction.ttft_s, 1e-6)
    step_s = tpot_ms(shape, 1, reference_input_tokens) / 1000
    return reference_input_tokens / max(ttft_s - step_s, ttft_s / 10)


def runs_inside(variant: Variant) -> bool:
    """Whether the replica's own process simulates the engine (`--sim-inside`)."""
    return variant.shape.engine == "sim" and _INSIDE in variant.shape.engine_args


def _adapter_flags(arguments: Sequence[str]) -> list[str]:
    """What the simulator understands of vLLM's flags for adapters."""
    if "--enable-lora" not in arguments:
        return []
    rank = arguments.index("--max-lora-rank")
    return ["--enable-lora", *arguments[rank : rank + 2]]


def _transfer_flags(shape: Shape) -> list[str]:
    """What tells vLLM to hand KV caches on to other engines, each rank's over a link of its own."""
    flags = [each for each in shape.engine_args if each.startswith("--kv-transfer-config=")]
    if not flags:
        return []
    speed = _TRANSFER_BYTES_PER_S / max(shape.kv_bytes_per_token, 1)
    return [flags[-1], "--kv-transfer-tokens-per-s", f"{speed:.6g}"]


def _own_flags(arguments: Sequence[str]) -> Iterator[str]:
    """`--sim-x value` and `--sim-x=value` as `--x value` and `--x=value`; others are left out."""
    takes_value = False
    for argument in arguments:
        if argument == _INSIDE:
            takes_value = False
        elif argument.startswith(_OWN_FLAG):
            yield f"--{argument.removeprefix(_OWN_FLAG)}"
            takes_value = "=" not in argument
        else:
            if takes_value:
                yield argument
            takes_value = False
