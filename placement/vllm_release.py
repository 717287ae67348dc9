"""What differs between vLLM releases in the memory that a rank takes beside weights and cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

_GIB = 1024**3
DEFAULT_RELEASE = "0.32"
MEASURED_RELEASE = "0.31"  # the newest of which start-up logs were read


@dataclass(frozen=True, slots=True)
class VllmRelease:
    """Measured constants; a new release gets a row once its start-up log was read."""

    sampler_bytes: float  # peak per request slot and vocabulary entry
    non_torch_gib: float  # growth on a rank that is alone
    collective_gib: float  # the same on each of several tensor or data parallel ranks (NCCL)
    pipeline_gib: float  # the same on a stage of one rank
    cuda_graph_gib: float = 0.0  # estimate that is taken from the KV cache
    admission_sampler_bytes: float = (
        0.0  # sampler and graphs together are taken to be at least this
    )
    profiles_whole_context: bool = False  # V0: one step is a prompt of max_model_len tokens

    @property
    def cuda_graph_bytes(self) -> int:
        """Taken from the KV cache for CUDA graphs."""
        return int(self.cuda_graph_gib * _GIB)

    def sampler_peak_bytes(self, *, max_num_seqs: int, vocab_size: int) -> int:
        """What the sampler needs beside the hidden states, on as many rows as there are slots."""
        logits = max_num_seqs * vocab_size
        at_least = int(self.admission_sampler_bytes * logits) - self.cuda_graph_bytes
        return max(int(self.sampler_bytes * logits), at_least)

    def non_torch_bytes(self, *, num_stages: int, ranks_per_stage: int) -> int:
        """Memory that torch does not know of, on one rank; stages count data-parallel ranks too."""
        gib = self.non_torch_gib if num_stages == 1 else self.pipeline_gib
        return int((self.collective_gib if ranks_per_stage > 1 else gib) * _GIB)


# V0: vllm issue 10517; several ranks a guess.
# Sampler, beside hidden states and residual: before 0.17 37.9 B x max_num_seqs x vocabulary
# (PyTorch's sort; H100 logs of llm-d, 1,024 slots, 0.6 B to 120 B parameters, within 1%); from 0.17
# on 14.5 B (a Triton kernel; llm-d-planner accuracy/, Llama, Qwen, Gemma with 0.17 to 0.19).
# Outside torch: more from 0.18 on, with tensor parallelism 2.1 GiB (H100; 1.7 on RTX PRO 6000).
# Graphs: from 0.21 on an estimate is subtracted, 0.3 to 1.6 GiB in logs; 0.9 leaves the A100 log of
# 0.31. No log of 0.32 was read. Admission takes the sampler of old or sampler and graphs of new,
# whichever is more, and halfway between old and new for the rest: within 3% of logs of both kinds.
RELEASES: Mapping[str, VllmRelease] = {
    "0.6": VllmRelease(37.9, 0.35, 0.77, 0.35, profiles_whole_context=True),
    "0.10": VllmRelease(37.9, 0.13, 0.55, 0.13),
    "0.17": VllmRelease(14.5, 0.13, 0.55, 0.13),
    "0.18": VllmRelease(14.5, 0.25, 2.1, 0.07),
    "0.21": VllmRelease(14.5, 0.25, 2.1, 0.07, cuda_graph_gib=0.9),
    "0.32": VllmRelease(14.5, 0.2, 1.3, 0.1, cuda_graph_gib=0.7, admission_sampler_bytes=37.9),
}


@cache
def release(name: str) -> VllmRelease:
    """The constants of the newest known release that is not newer than `name`, e.g. `0.19.1`."""
    wanted = _number(name)
    known = [each for each in RELEASES if _number(each) <= wanted]
    return RELEASES[max(known, key=_number, default=min(RELEASES, key=_number))]


def _number(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())
