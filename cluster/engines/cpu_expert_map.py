"""vLLM plugin: expert parallelism on the CPU.

vLLM 0.32's CPU expert kernel ignores the expert map: it takes the router's global expert ids as
indices into the experts that this rank holds, reads past their end and crashes. Here the ids are
mapped first, and the experts of other ranks get weight 0; vLLM then sums over the ranks.

The plugin (`cluster.engines.cpu_plugin`) applies it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

AFFECTED_VERSIONS = ("0.32.",)  # beginnings of version numbers
EXPERTS_MODULE = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"


def map_experts(module: ModuleType) -> None:
    """Let the CPU experts of `module` see local expert ids. Doing it twice is doing it once."""
    experts = module.CPUUnquantizedExperts
    if not hasattr(experts.apply, "__wrapped__"):
        experts.apply = _with_local_experts(experts.apply)


def _with_local_experts(apply: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(apply)

    @functools.wraps(apply)
    def apply_local(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        arguments = call.arguments
        expert_map = arguments["expert_map"]
        if expert_map is not None:
            if arguments["apply_router_weight_on_input"]:
                raise NotImplementedError(
                    "expert parallelism on CPUs needs router weights on the experts' output"
                )
            ids, weights = arguments["topk_ids"], arguments["topk_weights"]
            local = expert_map[ids.long()].to(ids.dtype)  # -1: another rank's
            arguments["topk_ids"] = local.clamp(min=0)
            arguments["topk_weights"] = weights.masked_fill(local < 0, 0)
        apply(*call.args, **call.kwargs)

    return apply_local
