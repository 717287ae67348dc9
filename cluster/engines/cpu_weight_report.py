"""Let vLLM say on CPUs, as it does on GPUs, how many bytes of weights a rank has loaded."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

LOADER_MODULE = "vllm.model_executor.model_loader.base_loader"

logger = logging.getLogger("vllm.bora")


def report_weights(module: ModuleType) -> None:
    """Log the parameters' bytes before the CPU kernels repack them. Twice is once."""
    process = module.process_weights_after_loading
    if hasattr(process, "__wrapped__"):
        return

    @functools.wraps(process)
    def report_and_process(model: Any, *args: Any, **kwargs: Any) -> None:
        loaded = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        logger.info("Model loading took %.9f GiB memory (weights of this rank)", loaded / 2**30)
        process(model, *args, **kwargs)

    module.process_weights_after_loading = report_and_process  # type: ignore[attr-defined]
