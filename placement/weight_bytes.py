"""Bytes of weights: of a checkpoint file, and of what a rank keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.architecture import Architecture
from placement.candidate import Candidate
from placement.catalogue import Checkpoint, Precision
from placement.gguf_mix import gguf_tensors
from placement.parameters import Parameters, count_parameters, rank_parameters
from placement.pipeline import Stage, whole_model

# Bits per weight of whole llama.cpp files, tools/quantize/README.md (Llama-3.1-8B). The legacy
# types (q4_0 ...) by arithmetic: 32 weights and one or two 16-bit numbers.
GGUF_BITS: Mapping[str, float] = {
    "iq1_s": 2.0042, "iq1_m": 2.1460, "iq2_xxs": 2.3824, "iq2_xs": 2.5882, "iq2_s": 2.7403,
    "iq2_m": 2.9294, "iq3_xxs": 3.2548, "iq3_xs": 3.4977, "iq3_s": 3.6606, "iq3_m": 3.7628,
    "iq4_xs": 4.4597, "iq4_nl": 4.6818, "q2_k": 3.1593, "q3_k_s": 3.6429, "q3_k_m": 3.9960,
    "q3_k_l": 4.2979, "q4_0": 4.5, "q4_1": 5.0, "q4_k_s": 4.6672, "q4_k_m": 4.8944, "q5_0": 5.5,
    "q5_1": 6.0, "q5_k_s": 5.5704, "q5_k_m": 5.7036, "q6_k": 6.5633, "q8_0": 8.5008,
    "q2_k_l": 3.67, "q4_k_l": 5.28, "q5_k_l": 6.06, "q6_k_l": 6.81,
}  # fmt: skip
UNQUANTISED = frozenset({"fp32", "bf16", "fp16"})
_MXFP4_HIDDEN_TILE = 256  # oracle/mxfp4.py rounds the hidden size of experts up for its kernels


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Bytes per weight by what the weight is for."""

    attention: float
    feed_forward: float  # of dense layers, and shared experts
    experts: float
    rest: float  # embedding, head, norms, router, vision

    def of(self, parameters: Parameters) -> float:
        """Bytes of `parameters`."""
        return self.quantised(parameters) + self.kept(parameters)

    def quantised(self, parameters: Parameters) -> float:
        """Bytes of the tensors that the format quantises."""
        return sum(size * count for size, count in self._by_role(parameters) if size < 2)

    def kept(self, parameters: Parameters) -> float:
        """Bytes of the tensors that stay as they were."""
        return sum(size * count for size, count in self._by_role(parameters) if size >= 2)

    def _by_role(self, parameters: Parameters) -> tuple[tuple[float, int], ...]:
        wide = parameters.feed_forward + parameters.shared_experts
        others = parameters.total - parameters.attention - parameters.experts - wide
        return (
            (self.attention, parameters.attention),
            (self.feed_forward, wide),
            (self.experts, parameters.experts),
            (self.rest, others),
        )


def checkpoint_bytes(architecture: Architecture, checkpoint: Checkpoint) -> int:
    """Size of a checkpoint's weights: as published, or by arithmetic."""
    if checkpoint.size_bytes is not None:
        return checkpoint.size_bytes
    if checkpoint.format == "gguf":
        tensors = gguf_tensors(architecture, checkpoint.precision)
        if tensors is not None:
            return tensors.total
    whole = count_parameters(architecture)
    return int(stored_weights(checkpoint, architecture).of(whole))


def weights_bytes(candidate: Candidate, stage: Stage | None = None) -> int:
    """Weights on one rank of `stage` (the largest), with MLA's copies of kv_b on GPUs.

    Unquantised weights take the dtype's bytes. Quantised tensors follow `stored_weights`, scaled so
    that with the kept ones they make the checkpoint's published size where that is known. Absorbed
    copies W_UK and W_UV in 16 bit: heads x kv_lora x (nope + v) per layer (mla_attention.py
    process_weights_after_loading).
    """
    architecture = candidate.architecture
    stage = stage or whole_model(architecture.num_layers)
    rank = rank_parameters(
        loaded_architecture(candidate),
        tensor_parallel_size=candidate.tensor_parallel_size,
        expert_parallel=candidate.expert_parallel,
        data_parallel_size=candidate.data_parallel_size,
        num_redundant_experts=candidate.num_redundant_experts,
        stage=stage,
    )
    return int(parameters_bytes(candidate, rank)) + _absorbed_copies_bytes(candidate, stage)


def parameters_bytes(candidate: Candidate, parameters: Parameters) -> float:
    """Bytes that `parameters` of the candidate's checkpoint take once they are loaded."""
    architecture, checkpoint = candidate.architecture, candidate.checkpoint
    if checkpoint.precision in UNQUANTISED:
        return float(parameters.total * candidate.element_bytes)
    stored = stored_weights(checkpoint, architecture)
    quantised = stored.quantised(parameters) * _published_share(architecture, checkpoint, stored)
    quantised *= _padding(architecture, checkpoint.precision)
    return quantised + stored.kept(parameters)


def read_bytes(candidate: Candidate, rank: Parameters) -> tuple[float, float]:
    """Bytes of one rank that every step reads, and those of all its routed experts.

    Of the embedding a step reads some rows, of the vision tower nothing. MLA reads the 16-bit
    copies W_UK and W_UV in place of kv_b.
    """
    tied = candidate.architecture.tied_embeddings
    always = replace(rank, experts=0, idle_experts=0, vision=0)
    if not tied:
        always = replace(always, embedding=0)
    everything = parameters_bytes(candidate, replace(rank, vision=0))
    without = parameters_bytes(candidate, replace(rank, experts=0, idle_experts=0, vision=0))
    copies = _absorbed_copies_bytes(candidate, whole_model(candidate.architecture.num_layers))
    stored = stored_weights(candidate.checkpoint, candidate.architecture).attention
    more = copies * max(0.0, 1 - min(stored, 2.0) / 2)
    return parameters_bytes(candidate, always) + more, everything - without


def loaded_architecture(candidate: Candidate) -> Architecture:
    """The architecture without what the engine was told to leave out."""
    if candidate.language_model_only:
        return candidate.architecture.model_copy(update={"vision": None})
    return candidate.architecture


def stored_weights(checkpoint: Checkpoint, architecture: Architecture) -> StoredWeights:
    """How a checkpoint stores weights: all that its format quantises, or `checkpoint.quantised`.

    FP8 has a 32-bit scale for each 128 x 128 block. NVFP4 (4 bits and an 8-bit scale for 16
    weights) covers the experts of a mixture and what is like them, attention too in a dense model:
    so computed, Mistral Large 3 has its published 403.1 GB and Llama-3.3-70B its 42.8. MXFP4 (4
    bits and an 8-bit scale for 32 weights) covers experts. AWQ and GPTQ: 4 bits, and 32 bits for
    128 weights. Embeddings stay at 16 bits in all of them.
    """
    precision, quantised = checkpoint.precision, checkpoint.quantised
    if precision in GGUF_BITS:
        return StoredWeights(*(GGUF_BITS[precision] / 8,) * 4)
    usual = _STORED[precision]
    if precision == "nvfp4" and architecture.moe is not None:
        usual = replace(usual, attention=2.0)
    if quantised is None or precision in UNQUANTISED:
        return usual
    low = usual.experts
    return StoredWeights(
        attention=low if "attention" in quantised else 2.0,
        feed_forward=low if "feed_forward" in quantised else 2.0,
        experts=low if "experts" in quantised else 2.0,
        rest=2.0,
    )


_FP8, _FOUR_BITS = 1 + 4 / 128**2, 4.25 / 8
_STORED: Mapping[str, StoredWeights] = {
    "fp32": StoredWeights(4.0, 4.0, 4.0, 4.0),
    "bf16": StoredWeights(2.0, 2.0, 2.0, 2.0),
    "fp16": StoredWeights(2.0, 2.0, 2.0, 2.0),
    "fp8": StoredWeights(_FP8, _FP8, _FP8, 2.0),
    "nvfp4": StoredWeights(4.5 / 8, 4.5 / 8, 4.5 / 8, 2.0),
    "mxfp4": StoredWeights(2.0, 2.0, _FOUR_BITS, 2.0),
    "awq": StoredWeights(_FOUR_BITS, _FOUR_BITS, _FOUR_BITS, 2.0),
    "gptq": StoredWeights(_FOUR_BITS, _FOUR_BITS, _FOUR_BITS, 2.0),
}


def _published_share(
    architecture: Architecture, checkpoint: Checkpoint, stored: StoredWeights
) -> float:
    """What the quantised tensors take in truth, over what they would take by arithmetic."""
    if checkpoint.size_bytes is None:
        return 1.0
    whole = count_parameters(architecture)
    quantised = stored.quantised(whole)
    if quantised == 0:
        return 1.0
    return max(0.1, (checkpoint.size_bytes - stored.kept(whole)) / quantised)


def _padding(architecture: Architecture, precision: Precision) -> float:
    """Zeros that MXFP4 kernels want beside the weights: gpt-oss 2,880 becomes 3,072."""
    if precision != "mxfp4":
        return 1.0
    hidden = architecture.hidden_size
    return -(-hidden // _MXFP4_HIDDEN_TILE) * _MXFP4_HIDDEN_TILE / hidden


def _absorbed_copies_bytes(candidate: Candidate, stage: Stage) -> int:
    architecture = candidate.architecture
    mla = architecture.mla
    if mla is None or candidate.device.is_cpu:
        return 0
    heads = architecture.num_heads // candidate.tensor_parallel_size
    width = mla.qk_nope_head_dim + mla.v_head_dim
    return stage.num_layers * heads * mla.kv_lora_rank * width * 2
