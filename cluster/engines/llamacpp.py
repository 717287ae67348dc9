"""llama.cpp (xllamacpp 2026.10): command line, and what its log and pages tell."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.engines.adapter import EngineFacts, EngineLoad, Launch, Rank
from cluster.errors import EngineFailed
from placement.plan import Variant
from placement.speed_window import EngineCounters

MIB = 2**20

# The first of these that a log line holds tells the stage, in the order of a start.
_STAGES = (
    ("loading model '", "loading weights"),
    ("constructing llama_context", "allocating the KV cache"),
    ("reserving ...", "reserving buffers"),
    ("warming up", "warming up"),
    ("listening on", "starting the HTTP server"),
)
_CELLS = re.compile(r"llama_kv_cache: size = .*?\(\s*(\d+) cells")
_WEIGHTS = re.compile(r"load_tensors: +(\S+) model buffer size = +([\d.]+) MiB")
_METRIC = re.compile(r"^llamacpp:(\w+) (\S+)$", re.MULTILINE)
_PLANNED_SOURCE = ("--model", "--hf-repo")


@dataclass(frozen=True, slots=True)
class LlamacppEngine:
    """Starts `cluster.engines.llamacpp_server`, llama.cpp's own HTTP server in a process of ours."""

    @property
    def load_paths(self) -> tuple[str, ...]:
        """Where the load is told."""
        return ("/metrics", "/slots")

    def launch(
        self, variant: Variant, *, checkpoint: Path | str, host: str, port: int, api_key: str
    ) -> Launch:
        """Command and environment that serve `variant` on `host:port` under the name `variant.model`.

        The shape's own flags come after what bora adds, so that a fleet's `engine_args` count: no
        cache of prompts in host memory, which the plan has not counted; on a CPU as many threads
        as the replica has slots of it.
        """
        shape = variant.shape
        command = (
            *(sys.executable, "-m", "cluster.engines.llamacpp_server"),
            *("--model", str(checkpoint)),
            *("--kv-unified-per-slot", str(shape.max_model_len), "--cache-ram", "0"),
            *(("--threads", str(variant.gpus_per_replica)) if variant.gpu == "cpu" else ()),
            *_without_source(shape.engine_args),
            *("--alias", variant.model, "--host", host, "--port", str(port)),
            *("--host-memory-bytes", str(shape.host_memory_bytes)),
        )
        return Launch(command, {"LLAMA_API_KEY": api_key})

    def ranked(self, launch: Launch, rank: Rank) -> Launch:
        """It has no such form.

        Raises:
            EngineFailed: always.
        """
        del launch
        raise EngineFailed(f"llama.cpp cannot run on {rank.num_nodes} nodes; the plan must say 1")

    def stage(self, log_line: str) -> str | None:
        """What llama.cpp is doing, if this line of its log tells."""
        return next((stage for sign, stage in _STAGES if sign in log_line), None)

    def facts(self, log: str) -> EngineFacts:
        """KV tokens of the replica; weights of the fullest GPU, without GPUs those of the host.

        Weights repacked for the CPU are in a buffer of their own, beside that of the file.
        """
        cells = [int(count) for count in _CELLS.findall(log)]
        held: dict[str, float] = {}
        for device, mib in _WEIGHTS.findall(log):
            held[device] = held.get(device, 0.0) + float(mib)
        on_gpus = [mib for device, mib in held.items() if not _is_host(device)]
        weights = max(on_gpus) if on_gpus else sum(held.values())
        return EngineFacts(
            kv_cache_tokens=max(cells, default=None),
            weights_bytes=round(weights * MIB) if held else None,
        )

    def load(self, *pages: str) -> EngineLoad:
        """Requests and totals of `/metrics`; tasks, and tokens that busy slots hold, of `/slots`."""
        metrics, slots = pages[0], json.loads(pages[1])
        values = {name: float(value) for name, value in _METRIC.findall(metrics)}
        return EngineLoad(
            running=int(values.get("requests_processing", 0)),
            waiting=int(values.get("requests_deferred", 0)),
            kv_cache_usage=0.0,
            kv_cache_tokens=sum(
                slot.get("n_prompt_tokens", 0) for slot in slots if slot["is_processing"]
            ),
            counters=_counters(values),
            tasks=frozenset((slot["id"], slot["id_task"]) for slot in slots if "id_task" in slot),
        )

    def expert_balance(self, log: str) -> float | None:
        """It spreads no experts over ranks."""
        del log
        return None


def _counters(values: Mapping[str, float]) -> EngineCounters | None:
    """A prompt is counted when it was read, the tokens of an answer when it has ended."""
    if "prompt_seconds_total" not in values or "tokens_predicted_seconds_total" not in values:
        return None
    cached = values.get("prompt_tokens_cached_total", 0.0)
    return EngineCounters(
        prompts=0.0,
        ttft_s=values["prompt_seconds_total"],
        prompt_tokens=values.get("prompt_tokens_total", 0.0) + cached,
        cached_tokens=cached,
        intervals=values.get("tokens_predicted_total", 0.0),
        intervals_s=values["tokens_predicted_seconds_total"],
        drafted=values.get("spec_decode_num_draft_tokens_total", 0.0),
    )


def _is_host(buffer: str) -> bool:
    """`CPU`, `CPU_Mapped`, `CPU_REPACK`, and memory of the host that a GPU can read."""
    return buffer.startswith("CPU") or buffer.endswith("_Host")


def _without_source(engine_args: tuple[str, ...]) -> Iterator[str]:
    """The planned flags without the planned source: the checkpoint is on this node by now."""
    flags = iter(engine_args)
    for flag in flags:
        if flag in _PLANNED_SOURCE:
            next(flags, None)
        else:
            yield flag
