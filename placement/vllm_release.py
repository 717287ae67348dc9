"""What differs between vLLM releases in the memory that a rank takes beside weights and cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_GIB = 1024**3
DEFAULT_RELEASE = "0.32"


@dataclass(frozen=True, slots=True)
class VllmRelease:
    """Measured constants; a new release gets a row once its start-up log was read."""

    sampler_bytes: float  # peak per request slot and vocabulary entry
    non_torch_bytes: tuple[int, int]  # growth on one rank, and on each of several (NCCL)
    cuda_graph_bytes: int  # taken from the KV cache for them
    profiles_whole_context: bool = False  # V0: one step is a prompt of max_model_len tokens


# sampler: 38.7 B x max_num_seqs x vocabulary in seven H100 logs (llm-d, 1,024 slots, 0.6 B to 120 B
# parameters, TP 1 and 2) within 2.5%: PyTorch's sort. 0.32 samples with a Triton kernel, which
# should need about 14 B; until a log of it was read, admission reckons with the old peak.
# graphs: those logs add up without any. From 0.19 on vLLM subtracts an estimate of them
# (VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS); logs show 0.1 to 1.0 GiB.
_V1_NON_TORCH_BYTES = (int(0.13 * _GIB), int(0.55 * _GIB))
_WITH_GRAPHS = VllmRelease(
    sampler_bytes=38.7, non_torch_bytes=_V1_NON_TORCH_BYTES, cuda_graph_bytes=_GIB // 4
)
RELEASES: Mapping[str, VllmRelease] = {
    "0.6": VllmRelease(
        sampler_bytes=38.7,
        non_torch_bytes=(int(0.35 * _GIB), int(0.77 * _GIB)),  # vllm issue 10517; TP a guess
        cuda_graph_bytes=0,
        profiles_whole_context=True,
    ),
    "0.10": VllmRelease(
        sampler_bytes=38.7, non_torch_bytes=_V1_NON_TORCH_BYTES, cuda_graph_bytes=0
    ),
    "0.19": _WITH_GRAPHS,
    "0.32": _WITH_GRAPHS,
}


def release(name: str) -> VllmRelease:
    """The constants of the newest known release that is not newer than `name`, e.g. `0.19.1`."""
    wanted = _number(name)
    known = [each for each in RELEASES if _number(each) <= wanted]
    return RELEASES[max(known, key=_number, default=min(RELEASES, key=_number))]


def _number(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())
