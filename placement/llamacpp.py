"""Where llama.cpp puts a GGUF model: layers and KV cache on GPUs or in host memory, buffers, reserves.

What lives where (src/llama-model.cpp load_tensors): the embedding table always in host memory, one
copy of it as the head when they are tied; the head counts as the layer after the last; with
`--n-gpu-layers n` the last n of these layers + head go to the GPUs, so the head goes first. A layer's
KV cache is where the layer is. With `--n-cpu-moe n` the routed experts of the first n layers stay in
host memory. Several GPUs take contiguous runs of layers (`--tensor-split`).

The formulas for KV cache and compute buffers were compared with llama.cpp's own log (xllamacpp
2026.10.11549, flash attention on): tests/placement/test_llamacpp_engine.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from placement.architecture import Architecture
from placement.candidate import GIB
from placement.gguf_weights import GgufWeights
from placement.plan import GpuMemory

RESERVE_BYTES = GIB  # left free on each device: common/fit.cpp, fit_params_target 1024 MiB
CONTEXT_BYTES = 457 * 1024**2  # CUDA context and library kernels; ollama ml/device.go
MICRO_BATCH = 512  # llama-server's --ubatch-size
CONTEXT_PADDING = 256  # llama_context rounds n_ctx up
PROCESS_BYTES = GIB // 4  # the server itself and its vocabulary, in host memory
_PIPELINE_COPIES = 4  # of a graph's inputs, when several GPUs work at once (n_copies)
_Q8_BYTES = 34 / 32


@dataclass(frozen=True, slots=True)
class LlamaTask:
    """What llama.cpp is asked to hold: a model, a context of all slots together, a KV type."""

    architecture: Architecture
    weights: GgufWeights
    context: int
    kv_cache_dtype: str = "auto"  # auto: f16; fp8: q8_0
    num_slots: int = 1

    @property
    def cells(self) -> int:
        """Tokens in the cache, as llama.cpp rounds them."""
        return -(-self.context // CONTEXT_PADDING) * CONTEXT_PADDING


@dataclass(frozen=True, slots=True)
class Placement:
    """Who holds what: per GPU a number of layers, and how many layers keep their experts at home."""

    layers: tuple[int, ...]  # repeating layers of each GPU, in the order of the model
    head_on_gpu: bool
    cpu_moe_layers: int  # the first so many layers of the model have their experts in host memory
    gpus: tuple[GpuMemory, ...]
    host_bytes: int

    @property
    def gpu_layers(self) -> int:
        """Repeating layers on GPUs, with or without their experts."""
        return sum(self.layers)


def kv_bytes_per_layer_token(architecture: Architecture, kv_cache_dtype: str = "auto") -> int:
    """Bytes of a token in one layer's cache.

    Keys and values of all K/V heads, f16 (2 bytes) or q8_0 (34 bytes for 32 numbers). Latent
    attention caches the latent and the rope part once, without values (llama.cpp PR 19067). A
    sliding window saves nothing: the `llama` architecture of Mistral GGUFs has none.
    """
    mla = architecture.mla
    if mla is not None:
        elements = mla.kv_lora_rank + mla.qk_rope_head_dim
    else:
        elements = 2 * architecture.num_kv_heads * architecture.head_dim
    return int(elements * (_Q8_BYTES if kv_cache_dtype == "fp8" else 2))


def compute_buffer_bytes(task: LlamaTask, *, num_gpus: int = 1) -> int:
    """The buffer for one step of MICRO_BATCH tokens on a device.

    The feed-forward decides, 4 bytes x tokens x (5 hidden + 3 intermediate), where a mixture counts
    the experts that a token uses; or latent attention, 4 bytes x tokens x (4 hidden + heads x (two
    latents, queries, values)); or the logits of the slots. Beside it the attention mask, 2 bytes x
    tokens x context, which several GPUs hold four times.
    """
    architecture, mla = task.architecture, task.architecture.mla
    hidden, width = architecture.hidden_size, architecture.intermediate_size or 0
    moe = architecture.moe
    if moe is not None:
        used = moe.num_experts_per_token + moe.num_shared_experts
        width = max(width, used * moe.expert_intermediate_size)
    widest = 5 * hidden + 3 * width
    if mla is not None:
        head = 2 * mla.kv_lora_rank + 2 * mla.qk_rope_head_dim + mla.qk_nope_head_dim
        widest = max(widest, 4 * hidden + architecture.num_heads * (head + mla.v_head_dim))
    logits = 4 * task.num_slots * (architecture.vocab_size + hidden)
    mask = 2 * MICRO_BATCH * task.cells * (_PIPELINE_COPIES if num_gpus > 1 else 1)
    inputs = 36 * MICRO_BATCH
    return max(4 * MICRO_BATCH * widest, logits) + mask + inputs


def place(
    task: LlamaTask, *, memory_bytes: int, num_gpus: int, share: float = 1.0
) -> Placement | None:
    """Put as much as fits on `num_gpus` GPUs of `memory_bytes`; None when not even the head does.

    In order, as llama-fit-params does: everything on GPUs; a mixture's experts in host memory for
    as few layers as possible; as many whole layers (or, of a mixture, their dense parts) as fit,
    from the last one on. `share` caps what of a GPU may be used.
    """
    total = task.architecture.num_layers
    budget = _budget(task, memory_bytes, num_gpus, share)
    if num_gpus == 0:
        return _settle(task, (), cpu_moe_layers=0, memory_bytes=memory_bytes, head=False)
    everything = _all_on_gpus(task, num_gpus, budget)
    if everything is not None:
        return _settle(task, everything, cpu_moe_layers=0, memory_bytes=memory_bytes)
    most = total if task.weights.has_experts else 0
    low, high = 0, most
    while low < high:  # fewer experts at home means more on the GPUs: monotone
        middle = (low + high) // 2
        if sum(_back_to_front(task, num_gpus, middle, budget) or ()) == total:
            high = middle
        else:
            low = middle + 1
    layers = _back_to_front(task, num_gpus, low, budget)
    if layers is None:
        return None
    cpu_moe = low if sum(layers) == total else most
    return _settle(task, layers, cpu_moe_layers=cpu_moe, memory_bytes=memory_bytes)


def largest_context(
    task: LlamaTask, *, memory_bytes: int, num_gpus: int, at_most: int, share: float = 1.0
) -> int:
    """Tokens of cache, up to `at_most`, with which everything stays on the GPUs; or 0."""
    low, high = 0, at_most // CONTEXT_PADDING
    while low < high:
        middle = (low + high + 1) // 2
        wider = replace(task, context=middle * CONTEXT_PADDING)
        budget = _budget(wider, memory_bytes, num_gpus, share)
        if _all_on_gpus(wider, num_gpus, budget) is None:
            high = middle - 1
        else:
            low = middle
    return low * CONTEXT_PADDING


def _budget(task: LlamaTask, memory_bytes: int, num_gpus: int, share: float) -> int:
    """What weights and cache may take of a GPU."""
    usable = min(memory_bytes - RESERVE_BYTES, int(memory_bytes * share)) - CONTEXT_BYTES
    return usable - compute_buffer_bytes(task, num_gpus=num_gpus)


def _layer_kv(task: LlamaTask) -> int:
    return task.cells * kv_bytes_per_layer_token(task.architecture, task.kv_cache_dtype)


def _loads(task: LlamaTask, cpu_moe_layers: int) -> list[int]:
    """Bytes that each layer takes of its GPU, weights and cache."""
    kv = _layer_kv(task)
    return [
        layer.dense + kv + (0 if index < cpu_moe_layers else layer.experts)
        for index, layer in enumerate(task.weights.layers)
    ]


def _all_on_gpus(task: LlamaTask, num_gpus: int, budget: int) -> tuple[int, ...] | None:
    """Layers for each GPU when nothing has to stay in host memory: evenly, or as they fit."""
    total, loads = task.architecture.num_layers, _loads(task, 0)
    if sum(loads) + task.weights.head > num_gpus * budget:
        return None
    even, first = _even(total, num_gpus), 0
    held = []
    for count in even:
        held.append(sum(loads[first : first + count]))
        first += count
    held[-1] += task.weights.head
    if max(held) <= budget:
        return even
    packed = _back_to_front(task, num_gpus, 0, budget)
    return packed if packed is not None and sum(packed) == total else None


def _even(layers: int, num_gpus: int) -> tuple[int, ...]:
    """Layers and head dealt out evenly; the head sits on the last GPU."""
    if layers < num_gpus:
        return (0,) * (num_gpus - layers) + (1,) * layers
    base, more = divmod(layers + 1, num_gpus)
    counts = [base + (gpu < more) for gpu in range(num_gpus)]
    counts[-1] -= 1
    return tuple(counts)


def _back_to_front(
    task: LlamaTask, num_gpus: int, cpu_moe_layers: int, budget: int
) -> tuple[int, ...] | None:
    """Fill the last GPU from the head backwards, then the one before it; None: no room for a head."""
    counts = [0] * num_gpus
    gpu, free = num_gpus - 1, budget - task.weights.head
    if free < 0:
        return None
    for load in reversed(_loads(task, cpu_moe_layers)):
        while gpu >= 0 and load > free:
            gpu, free = gpu - 1, budget
        if gpu < 0:
            break
        counts[gpu] += 1
        free -= load
    return tuple(counts)


def _settle(
    task: LlamaTask,
    layers: tuple[int, ...],
    *,
    cpu_moe_layers: int,
    memory_bytes: int,
    head: bool = True,
) -> Placement:
    """Add up what each GPU and the host hold."""
    total, kv = task.architecture.num_layers, _layer_kv(task)
    first = total - sum(layers)
    weights = task.weights
    host = weights.embedding + PROCESS_BYTES + 4 * task.num_slots * task.architecture.vocab_size
    host += compute_buffer_bytes(task)
    host += sum(layer.dense + layer.experts + kv for layer in weights.layers[:first])
    host += sum(layer.experts for layer in weights.layers[first:cpu_moe_layers])
    host += 0 if head else weights.head
    gpus, index, loads = [], first, _loads(task, cpu_moe_layers)
    compute = compute_buffer_bytes(task, num_gpus=len(layers)) if layers else 0
    for gpu, count in enumerate(layers):
        held = sum(loads[index : index + count])
        held += weights.head if gpu == len(layers) - 1 else 0
        index += count
        gpus.append(
            GpuMemory(
                total_bytes=memory_bytes,
                weights_bytes=held - count * kv,
                activation_bytes=compute,
                non_torch_bytes=CONTEXT_BYTES,
                cuda_graph_bytes=0,
                kv_cache_bytes=count * kv,
                headroom_bytes=max(0, memory_bytes - held - compute - CONTEXT_BYTES),
            )
        )
    return Placement(
        layers=layers,
        head_on_gpu=head,
        cpu_moe_layers=min(cpu_moe_layers, total),
        gpus=tuple(gpus),
        host_bytes=host,
    )
