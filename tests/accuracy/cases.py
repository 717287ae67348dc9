"""From a row to the candidate that it measured, by rules that hold for all rows alike."""

from __future__ import annotations

import re
from dataclasses import dataclass

from placement.candidate import GIB, Candidate, simulated_device
from placement.catalogue import Checkpoint, GpuType, ModelSpec, Precision, load_catalogue
from placement.errors import UnknownName
from tests.accuracy.architectures import QUANTISED, SIZES, other_model
from tests.accuracy.rows import Row

CATALOGUE = load_catalogue()
DISPLAY_RELEASE = {"vLLM V1": "0.10"}  # before 0.17, by what its logs say
_MISTRAL = {
    "mistral-7b": "mistral-7b-v0.3",
    "mistral-nemo-2407": "mistral-nemo-12b",
    "mistral-small-22b-2409": "mistral-small-2409",
    "mistral-small-24b": "mistral-small-3-24b-2501",
    "mistral-small-24b-2501": "mistral-small-3-24b-2501",
    "mistral-small-3.1-24b": "mistral-small-3.1-24b-2503",
    "mistral-large-2-123b": "mistral-large-2411",
    "mistral-large-2407-123b": "mistral-large-2407",
    "mistral-large-3-675b": "mistral-large-3-675b-2512",
    "devstral-2-123b": "devstral-2-123b-2512",
    "devstral-small-2-24b": "devstral-small-2-24b-2512",
    "magistral-small-24b": "magistral-small-2506-2507",
    "ministral-3-3b-instruct": "ministral-3-3b-2512",
    "ministral-3-8b-instruct": "ministral-3-8b-2512",
    "mistral-small-4-119b": "mistral-small-4-119b-2603",
    "mixtral-8x22b": "mixtral-8x22b-v0.1",
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
}
_GPUS = {
    "H100-80": "H100-SXM",
    "H200": "H200-SXM",
    "A100-80": "A100-80-SXM",
    "A100-40": "A100-40-SXM",
    "A100/H100": "A100-80-SXM",  # the smaller computes in more memory; both are meant
    "RTX4090": "RTX-4090",
    "RTX3090": "RTX-3090",
    "RTXPRO6000": "RTX-PRO-6000",
}
_PRECISIONS: dict[str, Precision] = {"4-bit": "awq", "q4_k_m(new)": "q4_k_m", "fp32": "bf16"}
_LARGE_GPU_BYTES = 70 * GIB
_ESTIMATING = (0, 21)  # releases from here on: 0.92 of the memory by default


class Excluded(Exception):
    """The row cannot be predicted; the message is why."""


@dataclass(frozen=True, slots=True)
class Case:
    """A candidate, and what the row did not tell: then only its weights are known."""

    candidate: Candidate
    untold: tuple[str, ...]


def model_of(row: Row) -> ModelSpec:
    """Ours by catalogue, others by their configuration."""
    name = re.sub(r" \(text\)$", "", row.model).lower()
    try:
        return CATALOGUE.model(_MISTRAL.get(name, name))
    except UnknownName:
        found = other_model(name)
    if found is None:
        raise Excluded(f"the architecture of {row.model} is not known")
    return found


def checkpoint_of(row: Row, model: ModelSpec) -> Checkpoint:
    """Of the row's precision, its size by arithmetic: what is published is not asked."""
    name = row.precision.lower().removesuffix(" (online)")
    precision = _PRECISIONS.get(name, name)
    fields: dict[str, object] = {"precision": precision, "source": row.source}
    fields["quantised"] = QUANTISED.get((model.name, precision))
    fields["size_bytes"] = SIZES.get((model.name, precision))
    if precision.startswith(("q", "iq")):
        fields["format"] = "gguf"
    try:
        return Checkpoint.model_validate(fields)
    except ValueError:
        raise Excluded(f"{row.precision} is not among our formats") from None


def gpu_of(row: Row) -> GpuType:
    """The GPU type that the row's short name means."""
    try:
        return CATALOGUE.gpu(_GPUS.get(row.gpu, row.gpu))
    except UnknownName:
        raise Excluded(f"GPU type {row.gpu or '(none told)'} is not in the catalogue") from None


def case_of(row: Row) -> Case:
    """The candidate, with vLLM's own defaults where the row says nothing but the release."""
    if not row.engine.startswith("vLLM") or "omni" in row.engine:
        raise Excluded(f"engine {row.engine or '(none told)'} is not vLLM")
    model = model_of(row)
    checkpoint = checkpoint_of(row, model)
    gpu = gpu_of(row) if row.gpu else CATALOGUE.gpu("H100-SXM")
    device = simulated_device(gpu)
    release = release_of(row)
    untold = [] if row.gpu else ["GPU"]
    share, slots = _share(row, release), _slots(row, release, gpu)
    if share is None:
        untold.append("gpu_memory_utilization")
    if slots is None:
        untold.append("max_num_seqs")
    tokens = row.told(r"max_num_batched_tokens (\d+)")
    candidate = Candidate(
        model=model,
        checkpoint=checkpoint,
        device=device,
        tensor_parallel_size=row.tensor_parallel_size,
        pipeline_parallel_size=row.pipeline_parallel_size,
        expert_parallel=False,
        max_model_len=row.context or min(model.context, 16384),
        max_num_seqs=slots or 256,
        max_num_batched_tokens=max(int(tokens or _batched_tokens(gpu)), slots or 256),
        gpu_memory_utilization=share or 0.92,
        dtype="float32" if row.precision.lower() == "fp32" else "auto",
        kv_cache_dtype="fp8" if re.search(r"fp8 KV|kv-cache-dtype fp8", row.text) else "auto",
        vllm_release=release or "0.32",
    )
    return Case(candidate, tuple(untold))


def release_of(row: Row) -> str | None:
    """The vLLM release of a run: the first of a span, `vLLM V1` is 0.10, without a number None."""
    if row.engine in DISPLAY_RELEASE:
        return DISPLAY_RELEASE[row.engine]
    found = re.search(r"vLLM (\d+\.\d+)", row.engine)
    return found[1] if found else None


def _share(row: Row, release: str | None) -> float | None:
    told = row.told(r"util (0\.\d+)")
    if told is not None:
        return float(told)
    if release is None:
        return None
    return 0.92 if tuple(map(int, release.split("."))) >= _ESTIMATING else 0.9


def _slots(row: Row, release: str | None, gpu: GpuType) -> int | None:
    told = row.told(r"max_num_seqs (\d+)")
    if told is not None or row.batch is not None:
        return int(told or row.batch or 0)
    if release is None:
        return None
    if release in ("0.4", "0.5", "0.6"):
        return 256
    return 1024 if _is_large(gpu) else 256


def _batched_tokens(gpu: GpuType) -> int:
    return 8192 if _is_large(gpu) else 2048


def _is_large(gpu: GpuType) -> bool:
    """engine/arg_utils.py: 70 GiB and more, but not A100."""
    return (gpu.memory_bytes or 0) >= _LARGE_GPU_BYTES and "A100" not in gpu.name
