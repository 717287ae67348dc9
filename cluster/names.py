"""Names under which bora's parts find each other on a Ray cluster."""

NAMESPACE = "bora"
CONTROLLER = "bora-controller"
GATEWAY = "bora-gateway"
SLOT = "bora_slot"  # custom Ray resource of nodes without GPUs: how many ranks may run there
POOL_LABEL = "bora.pool"
GPU_LABEL = "bora.gpu"
MEMORY_LABEL = "bora.memory-gib"  # per GPU or slot; needed for nodes without GPUs
KV_CACHE_LABEL = "bora.kv-cache-gib"
