"""Handing a KV cache over from one engine to another, as vLLM's NixlConnector does: where it can.

The decode engine pulls the cache of a prompt out of the prefill engine's GPUs. Both say hello with a
hash of what shapes a cache (vllm distributed/kv_transfer/kv_connector/v1/nixl/metadata.py); what may
differ, tensor parallel sizes above all, is looked at after that (base_worker.py
_validate_remote_agent_handshake).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

from placement.candidate import Candidate
from placement.costs import Collective, ReplicaSpeed
from placement.efficiency import send
from placement.kv_cache import kv_block_size

Rule = Callable[[Candidate, Candidate], str | None]  # prefill, decode


def _other_checkpoint(prefill: Candidate, decode: Candidate) -> str | None:
    """The model's name is in the hash, and other weights make other keys and values."""
    if prefill.checkpoint == decode.checkpoint:
        return None
    return (
        f"a cache that {prefill.checkpoint.precision} weights wrote cannot be read by "
        f"{decode.checkpoint.precision} weights: vLLM wants the same checkpoint on both sides"
    )


def _more_than_tensor_parallel(prefill: Candidate, decode: Candidate) -> str | None:
    """Pulling knows tensor-parallel ranks only; bora gives each engine one side channel."""
    for side, candidate in (("prefill", prefill), ("decode", decode)):
        sizes = {
            "pipeline_parallel_size": candidate.pipeline_parallel_size,
            "data_parallel_size": candidate.data_parallel_size,
            "decode_context_parallel_size": candidate.decode_context_parallel_size,
            "num_nodes": candidate.num_nodes,
        }
        for name, size in sizes.items():
            if size > 1:
                return (
                    f"{name} {size} on the {side} side: a cache is handed over between "
                    "tensor-parallel ranks of one node each"
                )
    return None


def _sizes_do_not_divide(prefill: Candidate, decode: Candidate) -> str | None:
    """Each rank of the larger side has one partner (TransferTopology.tp_ratio)."""
    one, other = prefill.tensor_parallel_size, decode.tensor_parallel_size
    if max(one, other) % min(one, other) == 0:
        return None
    return f"tensor_parallel_size {one} and {other}: neither is a multiple of the other"


def _copied_heads(prefill: Candidate, decode: Candidate) -> str | None:
    """Copies of a head cannot be put together to fewer ranks; latents are copies on both sides."""
    ranks, heads = prefill.tensor_parallel_size, prefill.architecture.num_kv_heads
    fewer = decode.tensor_parallel_size < ranks
    if prefill.architecture.mla is not None or not fewer or ranks <= heads:
        return None
    return (
        f"{ranks} prefill ranks hold copies of {heads} K/V heads, which "
        f"{decode.tensor_parallel_size} decode ranks cannot read"
    )


def _other_kernel(prefill: Candidate, decode: Candidate) -> str | None:
    """The attention backend is in the hash, because each lays its blocks out in its own way."""
    one, other = attention_backend(prefill), attention_backend(decode)
    if one == other:
        return None
    return (
        f"{prefill.device.gpu.name} caches as {one} does and {decode.device.gpu.name} as {other}: "
        "vLLM hands no cache over between attention backends"
    )


def _other_blocks(prefill: Candidate, decode: Candidate) -> str | None:
    """Unlike sizes are possible in one direction and without windows; nobody needs them here."""
    one, other = _block_size(prefill), _block_size(decode)
    if one == other:
        return None
    return f"blocks of {one} tokens on the prefill side and of {other} on the decode side"


# A mixture of experts, latent attention and sliding windows (a hybrid cache) are no obstacles: the
# connector is a `SupportsHMA`, and latents are on each rank.
RULES: Mapping[str, Rule] = {
    "handover-needs-one-checkpoint": _other_checkpoint,
    "handover-needs-tensor-parallel-only": _more_than_tensor_parallel,
    "handover-needs-sizes-that-divide": _sizes_do_not_divide,
    "handover-needs-uncopied-heads": _copied_heads,
    "handover-needs-one-kernel": _other_kernel,
    "handover-needs-one-block-size": _other_blocks,
}


def first_obstacle(prefill: Candidate, decode: Candidate) -> tuple[str, str] | None:
    """Rule and reason for which no cache can go from one to the other; None: it can."""
    for name, rule in RULES.items():
        reason = rule(prefill, decode)
        if reason is not None:
            return name, reason
    return None


def attention_backend(candidate: Candidate) -> str:
    """VLLM's first choice on a GPU (platforms/cuda.py _get_backend_priorities, 0.32)."""
    capability = candidate.device.gpu.compute_capability
    latent, narrow = candidate.architecture.mla is not None, candidate.kv_cache_dtype == "fp8"
    if capability is None:
        if latent and candidate.device.amx:
            return "AMX_MLA"
        return "CPU_MLA" if latent else "CPU_ATTN"
    generation = int(capability)
    if latent:
        hopper = "FLASHMLA" if narrow else "FLASH_ATTN_MLA"
        return {9: hopper, 10: "FLASHINFER_MLA"}.get(generation, "TRITON_MLA")
    if generation < 8:
        return "TRITON_ATTN"
    # FlashAttention reads a narrow cache on Hopper only.
    if generation == 10 or (narrow and generation != 9):
        return "FLASHINFER"
    return "FLASH_ATTN"


def _block_size(candidate: Candidate) -> int:
    return kv_block_size(
        candidate.architecture,
        candidate.device.gpu,
        kv_element_bytes=candidate.kv_element_bytes,
        amx=candidate.device.amx,
    )


def cache_bytes(decode: Candidate, speed: ReplicaSpeed, tokens: float) -> float:
    """Bytes that all decode ranks together pull for `tokens` of a prompt; windows hold fewer."""
    held = decode.architecture.tokens_seen(tokens)
    return held * speed.kv_bytes_per_token * decode.tensor_parallel_size


def handover_links(
    prefill: Candidate, decode: Candidate, *, shares: tuple[float, float], one_node: bool
) -> tuple[Collective, Collective]:
    """What either end needs to send a cache, or to take one; a cache is as fast as the slower end.

    Of a node's network each replica has the `shares` that its GPUs are of the node's: all may send
    at once. Inside a node NVLink joins as many pairs of GPUs as the smaller side has.
    """
    pairs = min(prefill.tensor_parallel_size, decode.tensor_parallel_size)
    return (
        _end(prefill, shares[0], pairs=pairs, one_node=one_node),
        _end(decode, shares[1], pairs=pairs, one_node=one_node),
    )


def _end(candidate: Candidate, share: float, *, pairs: int, one_node: bool) -> Collective:
    hop = replace(candidate, pipeline_parallel_size=2, num_nodes=1 if one_node else 2)
    link, at_once = send(hop), share
    if one_node:
        at_once = float(pairs) if candidate.device.link == "nvlink" else 1.0
    return Collective(link.latency_s, link.s_per_byte / at_once)


def kv_transfer_args(candidate: Candidate) -> tuple[str, ...]:
    """VLLM's flag for an engine that hands caches over, or takes them; none for whole requests.

    What could not be fetched is computed anew, so that a lost prefill engine costs time only. The
    layout of the cache is the connector's own choice.
    """
    if candidate.role == "whole":
        return ()
    config = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer" if candidate.role == "prefill" else "kv_consumer",
        "kv_load_failure_policy": "recompute",
    }
    return (f"--kv-transfer-config={json.dumps(config, separators=(',', ':'))}",)
