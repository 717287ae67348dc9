"""vLLM plugin: expert parallelism on the CPU.

vLLM 0.32's CPU expert kernel ignores the expert map: it takes the router's global expert ids as
indices into the experts that this rank holds, reads past their end and crashes. Here the ids are
mapped first, and the experts of other ranks get weight 0; vLLM then sums over the ranks.

vLLM calls `register` in each of its processes, so this imports nothing that it might not need.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from cluster.engines import pixtral_without_torchvision

AFFECTED_VERSIONS = ("0.32.",)
EXPERTS_MODULE = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"

logger = logging.getLogger(__name__)


def register(experts_module: str = EXPERTS_MODULE) -> None:
    """Make expert parallelism, and Pixtral, work on a CPU; on GPUs do nothing.

    The experts are changed once they are imported, in a vLLM version that needs it.
    """
    import vllm  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    if not current_platform.is_cpu():
        return
    pixtral_without_torchvision.install()
    if not vllm.__version__.startswith(AFFECTED_VERSIONS):
        logger.warning(
            "bora's fix for expert parallelism on CPUs is for vLLM %s*, this is %s: left out",
            AFFECTED_VERSIONS[0],
            vllm.__version__,
        )
        return
    if module := sys.modules.get(experts_module):
        map_experts(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(experts_module, map_experts))


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


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `change` with the module `name` once it is imported, if it ever is."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._change = change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, with a loader that changes it after it has run."""
        del path, target
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                self._change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
