"""What widely read pages claim about these models, and what our own functions say to it.

Each truth is computed here and now; the claims are quoted from the pages that this project started
from (Clore.ai on Mistral Large 3, Prositronic on Mistral Small, a course page on Mixtral, a French
article on Mistral Small 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from placement.candidate import GIB
from placement.catalogue import Catalogue
from placement.fit import fit
from placement.fit_answer import FitAnswer
from placement.fit_checkpoints import Subject
from placement.fit_request import make_request
from placement.fit_summary import closest
from placement.gguf_weights import gguf_size_bytes
from placement.parameters import count_parameters
from placement.weight_bytes import checkpoint_bytes

_LARGE = "mistral-large-3-675b-2512"
_SMALL = "mistral-small-3-24b-2501"
_MIXTRAL = "mixtral-8x7b"


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of a page, and what is true."""

    page: str
    says: str
    truth: str
    holds: bool


def claims(catalogue: Catalogue) -> tuple[Claim, ...]:
    """All of them, from this catalogue's numbers."""
    return (
        _large_on_4090s(catalogue),
        _large_on_h100s(catalogue),
        _h200_memory(catalogue),
        _nvfp4_on_a100s(catalogue),
        _disk(catalogue),
        _active_parameters(catalogue),
        _small_on_l40s(catalogue),
        _small_speed(catalogue),
        _mixtral_window(catalogue),
        _mixtral_speed(catalogue),
        _mixtral_on_two_cards(catalogue),
    )


def _ask(catalogue: Catalogue, model: str, gpu: str, **options: Any) -> FitAnswer:
    return fit(Subject(catalogue.model(model)), make_request(gpu, **options), catalogue)


def _large_on_4090s(catalogue: Catalogue) -> Claim:
    answer = _ask(catalogue, _LARGE, "RTX-4090:4", precision="q4_k_m", host_memory_gib=128)
    return Claim(
        page="Clore.ai",
        says="Mistral Large 3 as a Q4 GGUF on 4 x RTX 4090 (96 GB) with 128 GB of RAM",
        truth=_reasons(answer),
        holds=answer.verdict in ("fits", "offload"),
    )


def _large_on_h100s(catalogue: Catalogue) -> Claim:
    answer = _ask(catalogue, _LARGE, "H100-SXM:8", precision="fp8", max_model_len=262144)
    return Claim(
        page="Clore.ai",
        says="8 x H100: FP8, full 256k context",
        truth=f"{answer.summary}. Ways out: {'; '.join(answer.advice) or 'none found'}",
        holds=answer.verdict == "fits",
    )


def _h200_memory(catalogue: Catalogue) -> Claim:
    h100, h200 = catalogue.gpu("H100-SXM"), catalogue.gpu("H200-SXM")
    sizes = [(gpu.memory_bytes or 0) / GIB for gpu in (h100, h200)]
    return Claim(
        page="Clore.ai",
        says="8 x H100/H200 are 8 x 80 GB",
        truth=f"torch sees {sizes[0]:.1f} GiB on an H100 and {sizes[1]:.1f} GiB on an H200",
        holds=sizes[0] == sizes[1],
    )


def _nvfp4_on_a100s(catalogue: Catalogue) -> Claim:
    answer = _ask(catalogue, _LARGE, "A100-80-SXM:8", precision="nvfp4", max_model_len=262144)
    best = answer.best
    if best is None:
        return Claim("Clore.ai", "NVFP4 is made for A100/H100 nodes", answer.summary, holds=False)
    notes = " ".join(f"{note}." for note in best.notes)
    return Claim(
        page="Clore.ai",
        says="the NVFP4 checkpoint is made for A100/H100 nodes; 8 x A100 80GB with full context",
        truth=(
            f"{answer.verdict}: {best.per_gpu.weights_bytes / GIB:.1f} GiB of weights on each GPU "
            f"leave {best.kv_cache_tokens:,} tokens of KV cache, the same on every rank: "
            f"{best.max_concurrency:.1f} requests of 256k. {notes}"
        ),
        holds=False,
    )


def _disk(catalogue: Catalogue) -> Claim:
    model = catalogue.model(_LARGE)
    sizes = []
    for precision in ("q4_k_m", "nvfp4", "fp8", "bf16"):
        stored = [entry for entry in model.checkpoints if entry.precision == precision]
        if not stored:
            continue
        measure = gguf_size_bytes if stored[0].format == "gguf" else checkpoint_bytes
        sizes.append(f"{precision} {measure(model.architecture, stored[0]) / 1e9:.0f} GB")
    return Claim(
        page="Clore.ai",
        says="disk: 400 GB for Q4, 700 GB for NVFP4, 1.4 TB for FP8",
        truth=f"the weights alone are {', '.join(sizes)}",
        holds=False,
    )


def _active_parameters(catalogue: Catalogue) -> Claim:
    counted = count_parameters(catalogue.model(_LARGE).architecture)
    language = counted.active - counted.vision
    return Claim(
        page="Clore.ai",
        says="675B parameters, 41B of them active",
        truth=(
            f"{counted.total / 1e9:.1f} B with the vision tower; a token uses "
            f"{language / 1e9:.1f} B of language and {counted.vision / 1e9:.1f} B of vision"
        ),
        holds=True,
    )


def _small_on_l40s(catalogue: Catalogue) -> Claim:
    options = {"precision": "fp32", "engine": "llamacpp", "max_model_len": 512}
    answer = _ask(catalogue, _SMALL, "L40S", **options)
    total = (catalogue.gpu("L40S").memory_bytes or 0) / GIB
    if answer.best is None:
        truth = answer.summary
    else:
        best = answer.best
        used = (best.per_gpu.total_bytes - best.per_gpu.headroom_bytes) / GIB
        truth = (
            f"the card has {total:.1f} GiB; {best.gpu_layers} of {best.num_layers} layers and the "
            f"head take {used:.1f} GiB of it, {best.host_memory_bytes / GIB:.1f} GiB stay in host "
            f"memory, about {1000 / best.prediction.tpot_ms:.1f} tokens/s. FP32 is BF16 written "
            f"twice as wide: no gain"
        )
    return Claim(
        page="Prositronic",
        says="Mistral Small FP32 on one L40S: 47.5 of 48 GB used, 21 of 40 layers",
        truth=truth,
        holds=False,
    )


def _small_speed(catalogue: Catalogue) -> Claim:
    options = {"concurrency": 1, "input_tokens": 512, "output_tokens": 128}
    on_h100 = _ask(catalogue, _SMALL, "H100-SXM", precision="bf16", **options).best
    on_4090 = _ask(catalogue, _SMALL, "RTX-4090", precision="q4_k_m", **options).best
    speeds = [
        f"{1000 / shape.prediction.tpot_ms:.0f} tokens/s on {where}"
        for shape, where in ((on_h100, "an H100 in bf16"), (on_4090, "an RTX 4090 in Q4_K_M"))
        if shape is not None
    ]
    return Claim(
        page="LeMagIT",
        says='Mistral Small 3 has "a latency of 150 tokens per second"',
        truth=f"that is a throughput; one request alone: {', '.join(speeds)} (predicted)",
        holds=False,
    )


def _mixtral_window(catalogue: Catalogue) -> Claim:
    window = catalogue.model(_MIXTRAL).architecture.sliding_window
    older = catalogue.model("mistral-7b-v0.1").architecture.sliding_window
    return Claim(
        page="course page on Mixtral",
        says="Mixtral 8x7B attends within a sliding window of 4096",
        truth=(
            f"its configuration has {'no window' if window is None else f'a window of {window}'}; "
            f"of this family only Mistral 7B v0.1 has one ({older})"
        ),
        holds=window is not None,
    )


def _mixtral_speed(catalogue: Catalogue) -> Claim:
    architecture = catalogue.model(_MIXTRAL).architecture
    moe, counted = architecture.moe, count_parameters(architecture)
    if moe is None:
        raise ValueError("Mixtral without experts")
    read = moe.num_experts * (1 - (1 - moe.num_experts_per_token / moe.num_experts) ** 16)
    return Claim(
        page="course page on Mixtral",
        says="inference as fast as a dense model of 12.9B",
        truth=(
            f"for one request: {counted.active / 1e9:.1f} B of {counted.total / 1e9:.1f} B are "
            f"read; 16 requests together read {read:.1f} of {moe.num_experts} experts"
        ),
        holds=False,
    )


def _mixtral_on_two_cards(catalogue: Catalogue) -> Claim:
    options = {"precision": "bf16", "engine": "vllm", "tensor_parallel_size": 2}
    answer = _ask(catalogue, _MIXTRAL, "L40S:2", **options)
    return Claim(
        page="course page on Mixtral",
        says="vLLM with tensor_parallel_size=2 in 16 bits; 2 GPUs (48 GB) for Mixtral",
        truth=f"{_reasons(answer)}. Ways out: {'; '.join(answer.advice) or 'none found'}",
        holds=answer.verdict == "fits",
    )


def _reasons(answer: FitAnswer) -> str:
    nearest = closest(answer.rejected)
    if answer.best is not None or nearest is None:
        return answer.summary
    return f"{answer.verdict.replace('_', ' ')}: {nearest.rule}: {nearest.reason}"
