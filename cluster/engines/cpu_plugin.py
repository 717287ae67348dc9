"""vLLM plugin (entry point `vllm.general_plugins`), mostly for machines without a GPU.

vLLM calls `register` in each of its processes, so this imports nothing that it might not need.
"""

from __future__ import annotations

import logging

from cluster.engines import cpu_weight_report, pixtral_without_torchvision, responses_store
from cluster.engines.after_import import after_import
from cluster.engines.cpu_expert_exchange import COMMUNICATOR_MODULE, let_copies_exchange
from cluster.engines.cpu_expert_map import AFFECTED_VERSIONS, EXPERTS_MODULE, map_experts

logger = logging.getLogger(__name__)


def register(
    experts_module: str = EXPERTS_MODULE,
    loader_module: str = cpu_weight_report.LOADER_MODULE,
    communicator_module: str = COMMUNICATOR_MODULE,
) -> None:
    """Bound the store of responses; make expert and data parallelism and Pixtral work on a CPU.

    Expert kernel and communicator are changed only in a vLLM version that needs it.
    """
    import vllm  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    after_import(responses_store.SERVING_MODULE, responses_store.bound_store)
    if not current_platform.is_cpu():
        return
    pixtral_without_torchvision.install()
    after_import(loader_module, cpu_weight_report.report_weights)
    if vllm.__version__.startswith(AFFECTED_VERSIONS):
        after_import(experts_module, map_experts)
        after_import(communicator_module, let_copies_exchange)
    else:
        logger.warning(
            "bora's fixes for mixtures of experts on CPUs are for vLLM %s*, this is %s: left out",
            AFFECTED_VERSIONS[0],
            vllm.__version__,
        )
