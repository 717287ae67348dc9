"""The llama-server flags of a placement."""

from __future__ import annotations

from placement.catalogue import Checkpoint
from placement.fit_request import FitRequest
from placement.llamacpp import MICRO_BATCH, LlamaTask, Placement

DEFAULT_BATCH = 2048  # llama-server's


def llama_server_args(
    checkpoint: Checkpoint, task: LlamaTask, placement: Placement, request: FitRequest
) -> tuple[str, ...]:
    """Flags for `llama-server`, all explicit, so that it does not fit anything by itself.

    `--n-gpu-layers` counts the head as a layer. `--tensor-split` gives the layers of each GPU, the
    head among those of the last.
    """
    batch = request.max_num_batched_tokens or DEFAULT_BATCH
    args = [
        *_model(checkpoint),
        *("--ctx-size", str(task.cells)),
        *("--parallel", str(task.num_slots)),
        "--kv-unified",
        *("--batch-size", str(batch)),
        *("--ubatch-size", str(min(batch, MICRO_BATCH))),
        *("--flash-attn", "on"),
        *("--n-gpu-layers", str(placement.gpu_layers + placement.head_on_gpu)),
    ]
    if len(placement.layers) == 1:
        args += ["--split-mode", "none"]  # otherwise all GPUs of the node would be used
    if len(placement.layers) > 1:
        counts = list(placement.layers)
        counts[-1] += placement.head_on_gpu
        args += ["--split-mode", "layer", "--tensor-split", ",".join(map(str, counts))]
    if placement.cpu_moe_layers:
        args += ["--n-cpu-moe", str(placement.cpu_moe_layers)]
    if task.kv_cache_dtype == "fp8":
        args += ["--cache-type-k", "q8_0", "--cache-type-v", "q8_0"]
    return (*args, "--fit", "off", "--jinja", "--metrics")


def _model(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A file, or a Hugging Face repository and the quantisation wanted of it."""
    source = checkpoint.source
    if source.endswith(".gguf") or source.count("/") != 1:
        return ("--model", source)
    return ("--hf-repo", f"{source}:{checkpoint.precision.upper()}")
