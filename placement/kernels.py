"""How many GPU kernels a pass runs: each takes some microseconds however little it computes.

Counted in vLLM's layers, after torch.compile has fused norms with residuals and quantisation with
activations. A dense layer in 16 bits has 11, one of DeepSeek-V3 in FP8 has 29.
"""

from __future__ import annotations

from placement.architecture import Architecture

_GROUPED_HEADS = 7  # norm, qkv, rotation, cache write, attention, merge of its parts, o
_LATENT = (
    12  # norm, q_a and kv_a, two norms, q_b, rotation, cache write, W_UK, attention, merge, W_UV, o
)
_QK_NORMS = 2
_FEED_FORWARD = 4  # norm, gate and up, activation, down
_EXPERTS = 8  # norm, router, top-k, sort by expert, gate and up, activation, down, sum
_SHARED_EXPERTS = 3


def kernels_per_pass(architecture: Architecture, *, quantised_activations: bool) -> int:
    """Of all layers. FP8 and FP4 matrices want their inputs quantised, one kernel more for each."""
    quantise = int(quantised_activations)
    attention = _GROUPED_HEADS + 2 * quantise
    if architecture.mla is not None:
        attention = _LATENT + 3 * quantise
    if architecture.qk_norm:
        attention += _QK_NORMS
    moe, layers = architecture.moe, architecture.num_layers
    dense = layers if moe is None else moe.num_dense_layers
    experts = _EXPERTS + 2 * quantise
    if moe is not None and moe.num_shared_experts:
        experts += _SHARED_EXPERTS + quantise
    return layers * attention + dense * (_FEED_FORWARD + quantise) + (layers - dense) * experts
