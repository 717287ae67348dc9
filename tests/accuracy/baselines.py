"""Other people's rules for the same question, as they publish them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from placement.candidate import GIB, Candidate
from placement.kv_cache import kv_bytes_per_token
from placement.weight_bytes import checkpoint_bytes

NOMINAL_GIB = {
    "RTX-4090": 24, "RTX-3090": 24, "L40S": 48, "RTX-PRO-6000": 96, "A100-40-SXM": 40,
    "A100-80-SXM": 80, "H100-SXM": 80, "H200-SXM": 141, "B200": 180,
}  # fmt: skip


class Baseline(Protocol):
    """A rule that can be asked for the bytes of a rank's KV cache, and whether a request fits."""

    def kv_bytes(self, candidate: Candidate) -> float: ...

    def kv_tokens(self, candidate: Candidate) -> float: ...

    def fits(self, candidate: Candidate) -> bool: ...


def _nominal_bytes(candidate: Candidate) -> float:
    return NOMINAL_GIB[candidate.device.gpu.name] * float(GIB)


def _ranks(candidate: Candidate) -> int:
    return candidate.tensor_parallel_size * candidate.pipeline_parallel_size


@dataclass(frozen=True, slots=True)
class Gpustack:
    """1.2 x weights + 2 GiB, summed over the GPUs; no KV cache (policies/utils.py).

    What that leaves of the memory stands in for the KV cache that it does not compute.
    """

    def _left(self, candidate: Candidate) -> float:
        weights = checkpoint_bytes(candidate.architecture, candidate.checkpoint)
        total = _ranks(candidate) * (candidate.device.memory_bytes or 0)
        return total * candidate.gpu_memory_utilization - (1.2 * weights + 2 * GIB)

    def kv_bytes(self, candidate: Candidate) -> float:
        return max(0.0, self._left(candidate)) / _ranks(candidate)

    def kv_tokens(self, candidate: Candidate) -> float:
        return self.kv_bytes(candidate) / _token_bytes(candidate)

    def fits(self, candidate: Candidate) -> bool:
        return self._left(candidate) >= 0


@dataclass(frozen=True, slots=True)
class LlmdPlanner:
    """Memory x share - weights - activation - 0.15 | 0.6 GiB a GPU (PLANNING.md; BLIS kv_capacity.go).

    The activation is a constant: 5.5 GiB for dense models, 8 GiB for mixtures. `recalibrated` has
    the constants of llm-d-planner 0.3.3 (PyPI, measured with vLLM 0.19): 2.0 | 2.5 a replica, not a
    GPU, 0.27 | 2.1 GiB a GPU, on the nominal memory.
    """

    recalibrated: bool = False

    def kv_bytes(self, candidate: Candidate) -> float:
        mixture, ranks = candidate.architecture.moe is not None, _ranks(candidate)
        weights = checkpoint_bytes(candidate.architecture, candidate.checkpoint) / ranks
        many = candidate.tensor_parallel_size > 1
        if self.recalibrated:
            memory = _nominal_bytes(candidate)
            activation = (2.5 if mixture else 2.0) / ranks
            other = 2.1 if many else 0.27
        else:
            memory = float(candidate.device.memory_bytes or 0)
            activation = 8.0 if mixture else 5.5
            other = 0.6 if many else 0.15
        share = candidate.gpu_memory_utilization
        return max(0.0, memory * share - weights - (activation + other) * GIB)

    def kv_tokens(self, candidate: Candidate) -> float:
        return self.kv_bytes(candidate) / _token_bytes(candidate)

    def fits(self, candidate: Candidate) -> bool:
        return self.kv_tokens(candidate) >= candidate.max_model_len


@dataclass(frozen=True, slots=True)
class Prositronic:
    """The seeds' calculator: layers x size / layers + 1.25 x KV + 1.27 GiB of the nominal memory.

    MLA is computed as if every head were cached.
    """

    def kv_bytes(self, candidate: Candidate) -> float:
        ranks = _ranks(candidate)
        weights = checkpoint_bytes(candidate.architecture, candidate.checkpoint) / ranks
        return max(0.0, (_nominal_bytes(candidate) - weights - 1.27 * GIB) / 1.25)

    def kv_tokens(self, candidate: Candidate) -> float:
        return self.kv_bytes(candidate) / (self._token_bytes(candidate) / _ranks(candidate))

    def fits(self, candidate: Candidate) -> bool:
        return self.kv_tokens(candidate) >= candidate.max_model_len

    def _token_bytes(self, candidate: Candidate) -> float:
        architecture = candidate.architecture
        if architecture.mla is None:
            return kv_bytes_per_token(architecture, tensor_parallel_size=1, element_bytes=2)
        return 2.0 * 2 * architecture.num_layers * architecture.hidden_size


def _token_bytes(candidate: Candidate) -> float:
    """Keys and values of a token on one rank, of the model's own width."""
    return kv_bytes_per_token(
        candidate.architecture,
        tensor_parallel_size=candidate.tensor_parallel_size,
        element_bytes=2,
        num_layers=-(-candidate.architecture.num_layers // candidate.pipeline_parallel_size),
    )


BASELINES: dict[str, Baseline] = {
    "GPUStack": Gpustack(),
    "llm-d": LlmdPlanner(),
    "llm-d 0.3.3": LlmdPlanner(recalibrated=True),
    "Prositronic": Prositronic(),
}
