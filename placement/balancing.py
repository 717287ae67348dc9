"""Balancing of experts over ranks (EPLB): where it is possible, its flags and its memory."""

from __future__ import annotations

import json
from dataclasses import replace

from placement.candidate import Candidate
from placement.parameters import rank_parameters
from placement.pipeline import Stage
from placement.weight_bytes import parameters_bytes

_COUNTER_BYTES = 4  # of how many tokens an expert got in a step
# Of which kernels vLLM 0.32 can move the weights (supports_eplb in model_executor/layers).
_MOVABLE = frozenset({"fp32", "bf16", "fp16", "fp8", "nvfp4", "mxfp4"})


def can_balance(candidate: Candidate) -> bool:
    """Whether there is something to balance, and vLLM has the means: whole experts on GPUs."""
    moe = candidate.architecture.moe
    ranks = candidate.tensor_parallel_size * candidate.data_parallel_size
    whole = moe is not None and candidate.expert_parallel and ranks > 1
    return whole and not candidate.device.is_cpu and candidate.checkpoint.precision in _MOVABLE


def with_balance(candidate: Candidate) -> Candidate:
    """The candidate with its experts balanced, if that is wanted and possible.

    Of a dense model it is a mistake to want it, which `eplb_cannot_move_experts` tells.
    """
    wish = candidate.eplb
    if wish is None or not can_balance(candidate):
        return candidate
    return replace(candidate, enable_eplb=True, num_redundant_experts=wish.num_redundant_experts)


def eplb_cannot_move_experts(candidate: Candidate) -> str | None:
    """What is balanced are experts, whose kernels must know that they move."""
    if candidate.eplb is not None and candidate.architecture.moe is None:
        return f"{candidate.model.name} is dense: there are no experts to balance; leave eplb out"
    precision = candidate.checkpoint.precision
    if not candidate.enable_eplb or precision in _MOVABLE:
        return None
    return f"vLLM 0.32 cannot move {precision} experts between ranks, as EPLB does"


def balance_args(candidate: Candidate) -> tuple[str, ...]:
    """VLLM's flags, `log_balancedness` among them unless it is not wanted."""
    if not candidate.enable_eplb:
        return ()
    config: dict[str, int | bool] = {}
    if candidate.num_redundant_experts:
        config["num_redundant_experts"] = candidate.num_redundant_experts
    wish = candidate.eplb
    if wish is not None:
        config |= {"window_size": wish.window_size, "step_interval": wish.step_interval}
        if wish.log_interval:
            config |= {"log_balancedness": True, "log_balancedness_interval": wish.log_interval}
    return ("--enable-eplb", *(("--eplb-config", json.dumps(config)) if config else ()))


def balance_bytes(candidate: Candidate, stage: Stage) -> int:
    """What balancing takes on a rank beside redundant experts.

    A layer's experts once more, for those that come; and for every step of the window, in a table
    by experts and one that is made of it, each expert's tokens (eplb_state.py add_model, rearrange).
    """
    moe = candidate.architecture.moe
    if moe is None or not candidate.enable_eplb:
        return 0
    dense = min(stage.num_layers, max(0, moe.num_dense_layers - stage.first_layer))
    sparse = stage.num_layers - dense
    if not sparse:
        return 0
    experts = moe.num_experts + candidate.num_redundant_experts
    window = candidate.eplb.window_size if candidate.eplb is not None else 1000
    counters = window * sparse * (experts + moe.num_experts) * _COUNTER_BYTES
    return int(_expert_bytes(candidate, stage) / sparse) + counters


def _expert_bytes(candidate: Candidate, stage: Stage) -> float:
    """Of the routed experts of a rank of `stage`."""
    rank = rank_parameters(
        candidate.architecture,
        tensor_parallel_size=candidate.tensor_parallel_size,
        expert_parallel=True,
        data_parallel_size=candidate.data_parallel_size,
        num_redundant_experts=candidate.num_redundant_experts,
        stage=stage,
    )
    without = replace(rank, experts=0, idle_experts=0)
    return parameters_bytes(candidate, rank) - parameters_bytes(candidate, without)
