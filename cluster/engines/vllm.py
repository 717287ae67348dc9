"""vLLM 0.32: command line, environment, and what its log and metrics tell."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.engines import vllm_gang, vllm_output
from cluster.engines.adapter import (
    MEETING,
    EngineFacts,
    EngineLoad,
    Launch,
    Rank,
    side_channel,
)
from cluster.nano.store import default_cache
from placement.plan import Shape, Variant

GIB = 2**30
KEEP_ALIVE_S = 120  # longer than a gateway keeps an idle connection, so that the gateway closes it

# The first of these that a log line holds tells the stage, in the order of a start.
_STAGES = (
    ("non-default args", "reading the configuration"),
    ("Resolved architecture", "starting workers"),
    ("Started DP Coordinator", MEETING),
    ("with head node address", MEETING),
    ("distributed_init_method=tcp", MEETING),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "preparing weights"),
    ("Using cache directory", "compiling"),
    ("Dynamo bytecode transform", "compiling"),
    ("Warming up model", "compiling"),
    ("KV cache size", "allocating the KV cache"),
    ("Capturing CUDA graph", "capturing CUDA graphs"),
    ("init engine", "starting the HTTP server"),
)
_SHARDS = re.compile(r"Loading safetensors checkpoint shards:\s+(\d+)% Completed")
_OF_REPOSITORIES = ("--speculative-config", "--tokenizer=", "--hf-config-path", "--hf-overrides")


@dataclass(frozen=True, slots=True)
class VllmEngine:
    """Starts vLLM's OpenAI server. `cache` holds what vLLM keeps between starts."""

    cache: Path | None = None

    @property
    def load_paths(self) -> tuple[str, ...]:
        """Where the load is told."""
        return ("/metrics",)

    def launch(
        self, variant: Variant, *, checkpoint: Path | str, host: str, port: int, api_key: str
    ) -> Launch:
        """Command and environment that serve `variant` on `host:port` under the name `variant.model`.

        The shape's own flags come before those that decide where the server listens, and after
        `--enforce-eager`, so that a fleet's `--no-enforce-eager` counts.
        """
        on_cpu = variant.gpu == "cpu"
        command = (
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(checkpoint)),
            *(("--enforce-eager",) if on_cpu and _runs_eager(variant.shape) else ()),
            *_without_model(variant.shape.engine_args),
            *("--served-model-name", variant.model),
            *("--host", host, "--port", str(port)),
            "--disable-uvicorn-access-log",  # health checks and metrics, several a second
        )
        env = {
            "VLLM_API_KEY": api_key,
            "VLLM_CACHE_ROOT": str((self.cache or default_cache()) / "vllm"),
            "VLLM_DISABLE_LOG_LOGO": "1",
            "VLLM_ENABLE_RESPONSES_API_STORE": "1",  # `responses_store` bounds it
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
            "VLLM_NO_USAGE_STATS": "1",
            **side_channel(variant, host, port),
            **variant.shape.engine_environment,
        }
        if isinstance(checkpoint, Path) and not _names_repositories(variant.shape):
            env["HF_HUB_OFFLINE"] = "1"
        if "--enable-lora" in variant.shape.engine_args:
            env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if on_cpu:
            env |= _cpu_environment(variant.shape)
        return Launch(command, env)

    def ranked(self, launch: Launch, rank: Rank) -> Launch:
        """A node's share of an engine that spans several."""
        return vllm_gang.ranked(launch, rank)

    def stage(self, log_line: str) -> str | None:
        """What vLLM is doing, if this line of its log tells."""
        if shards := _SHARDS.search(log_line):
            return f"loading weights, {shards[1]} %"
        return next((stage for sign, stage in _STAGES if sign in log_line), None)

    def facts(self, log: str) -> EngineFacts:
        """KV tokens of the replica; bytes of the heaviest rank's weights."""
        return vllm_output.facts(log)

    def load(self, *pages: str) -> EngineLoad:
        """Requests summed, and KV usage averaged, over data parallel ranks."""
        return vllm_output.load(pages[0])

    def expert_balance(self, log: str) -> float | None:
        """Mean load of ranks over the largest, 0..1, if these lines of the log tell (EPLB)."""
        return vllm_output.expert_balance(log)


def _names_repositories(shape: Shape) -> bool:
    """Whether vLLM itself may have to download something beside the checkpoint."""
    return any(flag.startswith(_OF_REPOSITORIES) for flag in shape.engine_args)


def _runs_eager(shape: Shape) -> bool:
    """Compiling a small model takes longer than it saves; but on CPUs a pipeline needs it."""
    return shape.pipeline_parallel_size == 1


def _without_model(engine_args: tuple[str, ...]) -> tuple[str, ...]:
    """The planned flags without the planned source: the checkpoint is on this node by now."""
    return engine_args[2:] if engine_args[:1] == ("--model",) else engine_args


def _cpu_environment(shape: Shape) -> dict[str, str]:
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding asserts with two ranks on one NUMA node
        "OMP_NUM_THREADS": "1",
    }
    if shape.num_gpus == 1:
        # The one worker runs inside the engine core: a third less start-up time and memory.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if shape.per_gpu.kv_cache_bytes % GIB == 0:
        # The same as --kv-cache-memory-bytes, over which a variable left in the shell would win.
        env["VLLM_CPU_KVCACHE_SPACE"] = str(shape.per_gpu.kv_cache_bytes // GIB)
    return env
