"""Names under which bora's parts find each other, on a Ray cluster and on disk."""

from __future__ import annotations

from urllib.parse import quote

NAMESPACE = "bora"
CONTROLLER = "bora-controller"
GATEWAY = "bora-gateway"
SLOT = "bora_slot"  # custom Ray resource of nodes without GPUs: how many ranks may run there
NODE_LABEL = "ray.io/node-id"  # Ray's own
POOL_LABEL = "bora.pool"
GPU_LABEL = "bora.gpu"
MEMORY_LABEL = "bora.memory-gib"  # per GPU or slot; needed for nodes without GPUs
KV_CACHE_LABEL = "bora.kv-cache-gib"


def log_folder(model: str) -> str:
    """Folder of a model's logs, below `logs/`; `urllib.parse.unquote` gives the model back."""
    return quote(model, safe="")
