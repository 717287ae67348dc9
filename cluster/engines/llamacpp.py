"""llama.cpp (xllamacpp 2026.10): command line, and what its log and pages tell."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.engines.adapter import EngineFacts, EngineLoad, Launch, Rank
from cluster.errors import EngineFailed
from placement.plan import Variant

MIB = 2**20

# The first of these that a log line holds tells the stage, in the order of a start.
_STAGES = (
    ("downloading", "downloading weights"),
    ("loading model '", "loading weights"),
    ("constructing llama_context", "allocating the KV cache"),
    ("reserving ...", "reserving buffers"),
    ("warming up", "warming up"),
    ("listening on", "starting the HTTP server"),
)
_CELLS = re.compile(r"llama_kv_cache: size = .*?\(\s*(\d+) cells")
_WEIGHTS = re.compile(r"load_tensors: +(\S+) model buffer size = +([\d.]+) MiB")
_METRIC = re.compile(r"^llamacpp:requests_(processing|deferred) (\S+)$", re.MULTILINE)
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
            *_source(variant, checkpoint),
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
        """Requests of `/metrics`; tokens that the busy slots of `/slots` hold."""
        metrics, slots = pages
        values = {name: int(float(value)) for name, value in _METRIC.findall(metrics)}
        return EngineLoad(
            running=values.get("processing", 0),
            waiting=values.get("deferred", 0),
            kv_cache_usage=0.0,
            kv_cache_tokens=sum(
                slot.get("n_prompt_tokens", 0)
                for slot in json.loads(slots)
                if slot["is_processing"]
            ),
        )

    def expert_balance(self, log: str) -> float | None:
        """It spreads no experts over ranks."""
        del log
        return None


def _is_host(buffer: str) -> bool:
    """`CPU`, `CPU_Mapped`, `CPU_REPACK`, and memory of the host that a GPU can read."""
    return buffer.startswith("CPU") or buffer.endswith("_Host")


def _source(variant: Variant, checkpoint: Path | str) -> tuple[str, str]:
    """A file on this node, or a repository and the quantisation wanted of it."""
    if isinstance(checkpoint, Path):
        return ("--model", str(checkpoint))
    if checkpoint.endswith(".gguf"):
        return ("--model", checkpoint)  # which is not there: the server says so
    return ("--hf-repo", f"{checkpoint}:{variant.shape.precision.upper()}")


def _without_source(engine_args: tuple[str, ...]) -> Iterator[str]:
    """The planned flags without the planned source: the checkpoint is on this node by now."""
    flags = iter(engine_args)
    for flag in flags:
        if flag in _PLANNED_SOURCE:
            next(flags, None)
        else:
            yield flag
