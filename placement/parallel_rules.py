"""Rules on parallelism: can the model be cut this way, and are there GPUs for the pieces?"""

from __future__ import annotations

from collections import Counter

from placement.candidate import Candidate


def tensor_parallel_exceeds_node(candidate: Candidate) -> str | None:
    """Tensor parallelism needs the fast link inside a node."""
    ranks, gpus = candidate.tensor_parallel_size, candidate.device.gpus_per_node
    if ranks <= gpus or candidate.num_nodes > 1:
        return None
    return f"tensor_parallel_size {ranks} needs {ranks} GPUs in one node, a node has {gpus}"


def tensor_parallel_across_nodes(candidate: Candidate) -> str | None:
    """Two all-reduces a layer over the network: vLLM only warns, we want to be asked."""
    ranks, gpus = candidate.tensor_parallel_size, candidate.device.gpus_per_node
    if ranks <= gpus or candidate.tensor_parallel_across_nodes:
        return None
    return (
        f"tensor_parallel_size {ranks} would cross nodes of {gpus} GPUs and send two all-reduces a "
        f"layer over the network; use tensor_parallel_size {gpus} or less with pipeline stages"
    )


def replica_exceeds_gpus(candidate: Candidate) -> str | None:
    """Tensor-parallel groups stay within nodes, so a node holds a whole number of them."""
    nodes, gpus = candidate.num_nodes, candidate.device.gpus_per_node
    ranks, wanted = candidate.tensor_parallel_size, candidate.num_ranks
    groups = candidate.pipeline_parallel_size * candidate.data_parallel_size
    if candidate.stage_nodes:
        return _stages_exceed_node(candidate)
    if ranks > gpus:
        if wanted <= nodes * gpus:
            return None
    elif groups <= nodes * (gpus // ranks):
        return None
    return (
        f"{groups} groups of {ranks} GPUs need {wanted} GPUs; {nodes} "
        f"{'node has' if nodes == 1 else 'nodes have'} room for {nodes * (gpus // ranks)} groups"
    )


def _stages_exceed_node(candidate: Candidate) -> str | None:
    ranks = Counter[int]()
    for stage, node in enumerate(candidate.stage_nodes):
        ranks[node] += candidate.tensor_parallel_size
        gpus = candidate.stage_devices(stage)[0].gpus_per_node
        if ranks[node] > gpus:
            return f"node {node + 1} of the replica needs {ranks[node]} GPUs and has {gpus}"
    return None


def ranks_not_whole_on_nodes(candidate: Candidate) -> str | None:
    """Each node starts as many ranks, in order (vLLM's `--nnodes`); groups must not be torn.

    Nor data-parallel copies: a node holds whole ones, or is one of the nodes of one.
    """
    nodes, ranks, tensor = candidate.num_nodes, candidate.num_ranks, candidate.tensor_parallel_size
    each, rest = divmod(ranks, nodes)
    copy = tensor * candidate.pipeline_parallel_size
    if nodes == 1:
        return None
    if rest or (each % tensor and tensor % each):
        return f"{ranks} ranks in tensor-parallel groups of {tensor} do not lie evenly on {nodes} nodes"
    if candidate.data_parallel_size > 1 and each % copy and copy % each:
        return f"data-parallel copies of {copy} ranks do not lie evenly on nodes of {each} ranks"
    return None


def mixed_gpus_in_tensor_group(candidate: Candidate) -> str | None:
    """Ranks of a tensor-parallel group work in step, so the slowest and smallest would decide."""
    for stage in range(candidate.pipeline_parallel_size):
        names = sorted({device.gpu.name for device in candidate.stage_devices(stage)})
        if len(names) > 1:
            return f"stage {stage + 1} mixes {' and '.join(names)} in one tensor-parallel group"
    return None


def cpu_and_gpu_in_replica(candidate: Candidate) -> str | None:
    """VLLM is built for one or the other."""
    if len({device.is_cpu for device in candidate.rank_devices}) < 2:
        return None
    return "a pipeline cannot run on CPUs and GPUs at once"


def heads_not_divisible(candidate: Candidate) -> str | None:
    """Each rank computes as many attention heads (config/model.py verify_with_parallel_config)."""
    heads, ranks = candidate.architecture.num_heads, candidate.tensor_parallel_size
    if heads % ranks == 0:
        return None
    return f"{heads} attention heads cannot be split over {ranks} ranks"


def kv_heads_not_divisible(candidate: Candidate) -> str | None:
    """K/V heads are split evenly, or copied evenly (QKVParallelLinear). MLA has one latent."""
    heads, ranks = candidate.architecture.num_kv_heads, candidate.tensor_parallel_size
    even = heads % ranks == 0 or ranks % heads == 0
    if candidate.architecture.mla is not None or even:
        return None
    return f"{heads} K/V heads can be neither split nor copied evenly over {ranks} ranks"


def feed_forward_not_divisible(candidate: Candidate) -> str | None:
    """Matrices are cut along the intermediate size, unless experts stay whole."""
    architecture, ranks = candidate.architecture, candidate.tensor_parallel_size
    moe, shards = architecture.moe, ranks * candidate.data_parallel_size
    size = architecture.intermediate_size
    if size is not None and size % ranks:
        return f"intermediate_size {size} cannot be split over {ranks} ranks"
    if moe is None or candidate.expert_parallel or moe.expert_intermediate_size % shards == 0:
        return None
    size = moe.expert_intermediate_size
    return f"expert_intermediate_size {size} cannot be split over {shards} ranks"


def pipeline_not_supported(candidate: Candidate) -> str | None:
    """Only classes with `SupportsPP` can be cut into stages (config/model.py)."""
    if candidate.pipeline_parallel_size == 1 or candidate.model.supports_pipeline_parallel:
        return None
    stages = candidate.pipeline_parallel_size
    return f"vLLM cannot cut {candidate.model.name} into {stages} pipeline stages"


def more_stages_than_layers(candidate: Candidate) -> str | None:
    """A stage without a layer has nothing to do."""
    stages, layers = candidate.pipeline_parallel_size, candidate.architecture.num_layers
    if stages <= layers:
        return None
    return f"{layers} layers are too few for {stages} pipeline stages"


def layer_partition_mismatch(candidate: Candidate) -> str | None:
    """VLLM_PP_LAYER_PARTITION names every layer once (distributed/utils.py get_pp_indices)."""
    partition, layers = candidate.layer_partition, candidate.architecture.num_layers
    stages = candidate.pipeline_parallel_size
    if not partition:
        return None
    if len(partition) != stages:
        return f"a partition into {len(partition)} parts does not match {stages} pipeline stages"
    if sum(partition) != layers or min(partition) < 1:
        return f"the partition {'+'.join(map(str, partition))} does not make {layers} layers"
    return None


def data_parallel_needs_experts(candidate: Candidate) -> str | None:
    """Copies of a dense model share nothing: replicas do the same and fail alone."""
    copies = candidate.data_parallel_size
    if copies == 1 or candidate.architecture.moe is not None:
        return None
    return f"{candidate.model.name} is dense: {copies} replicas do what data_parallel_size would"


def copies_in_stages_need_gpus(candidate: Candidate) -> str | None:
    """On CPUs vLLM runs pipelines compiled only, and cannot compile what copies exchange (run)."""
    copies, stages = candidate.data_parallel_size, candidate.pipeline_parallel_size
    if copies == 1 or stages == 1 or not candidate.device.is_cpu:
        return None
    return f"{copies} data-parallel copies cannot have {stages} pipeline stages each on CPUs"


def expert_parallel_needs_experts(candidate: Candidate) -> str | None:
    """Only a mixture of experts has experts to spread, and each rank needs one."""
    if not candidate.expert_parallel:
        return None
    moe = candidate.architecture.moe
    ranks = candidate.tensor_parallel_size * candidate.data_parallel_size
    if moe is None:
        return f"{candidate.model.name} is dense: there are no experts to spread"
    if moe.num_experts < ranks:
        return f"{moe.num_experts} experts are too few for {ranks} ranks"
    return None


def eplb_needs_expert_parallel(candidate: Candidate) -> str | None:
    """Balancing moves whole experts between ranks (config/parallel.py)."""
    if candidate.num_redundant_experts and not candidate.enable_eplb:
        return f"{candidate.num_redundant_experts} redundant experts need enable_eplb"
    ranks = candidate.tensor_parallel_size * candidate.data_parallel_size
    if not candidate.enable_eplb or (candidate.expert_parallel and ranks > 1):
        return None
    return (
        f"EPLB balances whole experts over ranks: it needs expert_parallel on 2 ranks, not {ranks}"
    )


def eplb_needs_even_experts(candidate: Candidate) -> str | None:
    """With EPLB each rank holds as many experts (fused_moe/layer.py)."""
    moe = candidate.architecture.moe
    if moe is None or not candidate.enable_eplb:
        return None
    experts = moe.num_experts + candidate.num_redundant_experts
    ranks = candidate.tensor_parallel_size * candidate.data_parallel_size
    if experts % ranks == 0:
        return None
    return f"EPLB cannot spread {experts} experts evenly over {ranks} ranks"


def context_parallel_not_divisible(candidate: Candidate) -> str | None:
    """Decode context parallelism reuses the ranks of a tensor-parallel group."""
    ranks, parts = candidate.tensor_parallel_size, candidate.decode_context_parallel_size
    if ranks % parts == 0:
        return None
    return f"decode_context_parallel_size {parts} does not divide tensor_parallel_size {ranks}"


def context_parallel_needs_copied_heads(candidate: Candidate) -> str | None:
    """What is cut are the copies of a K/V head (config/model.py); latents are all copies."""
    architecture, ranks = candidate.architecture, candidate.tensor_parallel_size
    parts, heads = candidate.decode_context_parallel_size, architecture.num_kv_heads
    if parts == 1 or architecture.mla is not None:
        return None
    if ranks <= heads:
        return (
            f"decode_context_parallel_size {parts} needs copied K/V heads: tensor_parallel_size "
            f"{ranks} is not above {heads} heads"
        )
    if parts > ranks // heads:
        return (
            f"{ranks} ranks hold {ranks // heads} copies of {heads} K/V heads, too few for {parts}"
        )
    queries = architecture.num_heads // heads
    if queries % parts:
        return f"{queries} query heads per K/V head cannot be split over {parts} context ranks"
    return None


def context_parallel_has_no_windows(candidate: Candidate) -> str | None:
    """A sliding window cannot be cut along the context (SlidingWindowSpec)."""
    window, parts = candidate.architecture.sliding_window, candidate.decode_context_parallel_size
    if parts == 1 or window is None:
        return None
    return f"decode_context_parallel_size {parts} cannot cut a sliding window of {window:,} tokens"
