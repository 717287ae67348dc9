"""What is legal but costs speed or memory, said beside a shape."""

from __future__ import annotations

from collections.abc import Iterator

from placement.candidate import Candidate
from placement.format_rules import devices_of

FP8_CAPABILITY = 8.9  # W8A8 kernels; below, weights only (Marlin)
FP4_CAPABILITY = 10.0
CUSTOM_ALL_REDUCE_RANKS = (2, 4, 6, 8, 16)  # custom_all_reduce.py _SUPPORTED_WORLD_SIZES


def shape_notes(candidate: Candidate) -> tuple[str, ...]:
    """Warnings about a candidate that can run, one sentence each."""
    return (
        *_about_kernels(candidate),
        *_about_links(candidate),
        *_about_exchange(candidate),
        *_about_copies(candidate),
        *_about_balance(candidate),
    )


def weight_only(candidate: Candidate) -> bool:
    """Whether quantised weights are widened to 16 bits to be used: memory gain, no faster FLOPs."""
    precision = candidate.checkpoint.precision
    minimum = {"fp8": FP8_CAPABILITY, "nvfp4": FP4_CAPABILITY, "mxfp4": FP4_CAPABILITY}.get(
        precision
    )
    if precision in ("awq", "gptq"):
        return True
    if minimum is None:
        return False
    return any((device.gpu.compute_capability or 0) < minimum for device in devices_of(candidate))


def _about_kernels(candidate: Candidate) -> Iterator[str]:
    precision, gpu = candidate.checkpoint.precision, candidate.device.gpu
    capability = gpu.compute_capability
    if weight_only(candidate) and precision in ("fp8", "nvfp4", "mxfp4"):
        minimum = FP8_CAPABILITY if precision == "fp8" else FP4_CAPABILITY
        yield (
            f"{precision} is native from compute capability {minimum:g}, {gpu.name} has {capability:g}: "
            "weight-only Marlin kernels, a gain in memory but not in FLOPS"
        )
    if precision == "bf16" and capability is not None and capability < 8.0:
        yield f"{gpu.name} has no bfloat16: vLLM casts the weights to float16"
    if precision == "fp32" and candidate.element_bytes == 2:
        yield "dtype auto casts float32 weights to 16 bits; float32 itself would take twice as much"


def _about_balance(candidate: Candidate) -> Iterator[str]:
    if candidate.eplb is None or candidate.enable_eplb:
        return
    yield "experts are not balanced (eplb): that takes whole experts on several GPUs"


def _about_links(candidate: Candidate) -> Iterator[str]:
    ranks, device = candidate.tensor_parallel_size, candidate.device
    if ranks > device.gpus_per_node:
        yield f"{ranks} tensor-parallel ranks cross nodes: two all-reduces a layer use the network"
    if ranks == 1 or device.is_cpu:
        return
    if device.link == "pcie-no-p2p":
        yield f"{device.gpu.name} has no peer-to-peer: all-reduces go through host memory (NCCL)"
    elif device.link == "pcie" and ranks > 2:
        yield f"custom all-reduce is off for {ranks} GPUs on PCIe (more than 2): NCCL instead"
    elif ranks not in CUSTOM_ALL_REDUCE_RANKS:
        yield f"custom all-reduce knows 2, 4, 6, 8 and 16 ranks, not {ranks}: NCCL instead"


def _about_exchange(candidate: Candidate) -> Iterator[str]:
    copies, nodes = candidate.data_parallel_size, candidate.num_nodes
    if candidate.architecture.moe is None or copies == 1 or nodes == 1:
        return
    network = candidate.device.inter_node_bytes_per_s
    told = "unknown speed (links.inter_gbps)" if network is None else f"{network / 125e6:g} Gbit/s"
    yield (
        f"in each layer with experts the tokens of {copies} copies cross the network between {nodes} "
        f"nodes, of {told} a node; vLLM's other kernels send less, where their packages are on the "
        "nodes (engine_args: [--all2all-backend, deepep_low_latency])"
    )


def _about_copies(candidate: Candidate) -> Iterator[str]:
    architecture, ranks = candidate.architecture, candidate.tensor_parallel_size
    shards = ranks * candidate.data_parallel_size
    if architecture.mla is not None and ranks // candidate.decode_context_parallel_size > 1:
        yield (
            f"latent attention keeps the same KV cache on all {ranks} tensor-parallel ranks; "
            "data-parallel attention or decode context parallelism would not"
        )
    elif architecture.mla is None and ranks > architecture.num_kv_heads:
        yield f"{architecture.num_kv_heads} K/V heads are copied onto {ranks} ranks"
    moe = architecture.moe
    if moe is not None and candidate.expert_parallel and moe.num_experts % shards:
        yield f"{moe.num_experts} experts do not spread evenly over {shards} ranks"
    names = sorted({device.gpu.name for device in candidate.rank_devices})
    if len(names) > 1:
        yield f"stages on {' and '.join(names)}: the smallest KV cache and the slowest stage decide"
