"""The KV cache as vLLM 0.32 lays it out: pages, blocks, and the token count that it logs."""

from __future__ import annotations

from dataclasses import dataclass

from placement.architecture import Architecture
from placement.catalogue import GpuType
from placement.parameters import local_kv_heads

GPU_BLOCK_SIZE = 16
CPU_BLOCK_SIZE = 128  # platforms/cpu.py check_and_update_config
CUTLASS_MLA_BLOCK_SIZE = 128  # the MLA kernel of Blackwell data-centre GPUs
FLASHMLA_BLOCK_SIZE = 64  # Hopper's MLA kernel for an FP8 cache


@dataclass(frozen=True, slots=True)
class KvCache:
    """The cache of one rank; tokens and concurrency hold for the whole replica."""

    bytes_per_token: int
    block_size: int
    num_blocks: int
    blocks_per_request: int  # of max_model_len tokens
    tokens: int
    max_concurrency: float

    @property
    def holds_one_request(self) -> bool:
        """Whether vLLM starts: one block is never handed out (kv_cache_utils.py, null block)."""
        return self.num_blocks > self.blocks_per_request


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What decides how many blocks a request takes.

    Layers with and without a window form groups of as many layers, each with its own block table;
    a block holds the layers of one group (_get_kv_cache_groups_uniform_page_size).
    """

    bytes_per_token: int  # of the layers of one group, as far as they are on this rank
    block_size: int
    sliding_window: int | None
    max_in_flight_tokens: int
    num_full_groups: int = 0  # beside those with a window; without a window there is one group
    num_window_groups: int = 1
    decode_context_parallel_size: int = 1

    def blocks_per_request(self, max_model_len: int) -> int:
        """Blocks that vLLM reserves for one request of `max_model_len` tokens.

        Full attention: ceil(len / block_size), of the share of the context that a rank keeps
        (FullAttentionSpec.max_memory_usage_bytes). A window: ceil(min(window - 1 + in_flight, len)
        / block_size) + 1, because the window may begin inside a block
        (SlidingWindowSpec.max_admission_blocks_per_request).
        """
        share = -(-max_model_len // self.decode_context_parallel_size)
        full = -(-share // self.block_size)
        if self.sliding_window is None:
            return full
        held = min(self.sliding_window - 1 + self.max_in_flight_tokens, max_model_len)
        window = -(-held // self.block_size) + 1
        return self.num_full_groups * full + self.num_window_groups * window

    @property
    def bytes_per_context_token(self) -> int:
        """Of one rank, for a token of a request's context that all layers keep."""
        groups = 1
        if self.sliding_window is not None:
            groups = self.num_full_groups + self.num_window_groups
        return -(-self.bytes_per_token * groups // self.decode_context_parallel_size)


def kv_bytes_per_token(
    architecture: Architecture,
    *,
    tensor_parallel_size: int,
    element_bytes: int,
    num_layers: int | None = None,
) -> int:
    """Bytes of one token in one rank's cache, of all layers or `num_layers` of them.

    Grouped queries: layers x 2 (keys, values) x local heads x head_dim x element bytes. Latent
    attention: layers x (kv_lora_rank + rope) x element bytes on every rank, because the latent is
    one shared head (mla_attention.py get_kv_cache_spec: num_kv_heads=1, max_tp_shards=1).
    """
    if architecture.mla is not None:
        elements = architecture.mla.kv_lora_rank + architecture.mla.qk_rope_head_dim
    else:
        elements = 2 * local_kv_heads(architecture, tensor_parallel_size) * architecture.head_dim
    layers = architecture.num_layers if num_layers is None else num_layers
    return layers * elements * element_bytes


def layer_groups(architecture: Architecture) -> tuple[int, int, int]:
    """Groups of layers with full attention, groups with a window, and layers in a group.

    The smaller kind makes the size, or the larger when it has less than half as many more
    (_get_kv_cache_groups_uniform_page_size): gpt-oss 1, 1, 18; one full layer in four 1, 3, n / 4.
    """
    layers, full = architecture.num_layers, architecture.full_attention_layers
    if architecture.sliding_window is None or full >= layers:
        return 1, 0, layers
    if full == 0:
        return 0, 1, layers
    fewer, more = sorted((full, layers - full))
    size = more if more < 1.5 * fewer else fewer
    return -(-full // size), -(-(layers - full) // size), size


def kv_block_size(
    architecture: Architecture, gpu: GpuType, *, kv_element_bytes: int, amx: bool
) -> int:
    """Tokens in a block, vLLM's default for this attention on this device.

    On a CPU 128 (platforms/cpu.py), except latent attention without AMX tiles: 16. On GPUs 16,
    except the MLA kernels that need more (platforms/cuda.py): CUTLASS on compute capability 10.x,
    FlashMLA on 9.0 with an FP8 cache.
    """
    latent = architecture.mla is not None
    capability = gpu.compute_capability
    if capability is None:
        return GPU_BLOCK_SIZE if latent and not amx else CPU_BLOCK_SIZE
    if latent and int(capability) == 10:
        return CUTLASS_MLA_BLOCK_SIZE
    if latent and int(capability) == 9 and kv_element_bytes == 1:
        return FLASHMLA_BLOCK_SIZE
    return GPU_BLOCK_SIZE


def kv_cache(
    layout: KvLayout, *, available_bytes: int, max_model_len: int, data_parallel_size: int = 1
) -> KvCache:
    """The cache that vLLM makes of `available_bytes` on a rank.

    num_blocks = floor(available / (block_size x bytes_per_token)): layers share one block table,
    so a block holds all layers (get_kv_cache_config_from_groups). The logged size is
    int(num_blocks / blocks_per_request x max_model_len) in floating point
    (get_max_concurrency_for_kv_cache_config, get_kv_cache_capacity): blocks x block_size when
    block_size divides max_model_len and no window is used, otherwise less or more. Every
    data-parallel copy logs its own; here they are summed.
    """
    blocks = max(0, available_bytes) // (layout.block_size * layout.bytes_per_token)
    per_request = layout.blocks_per_request(max_model_len)
    max_concurrency = blocks / per_request
    return KvCache(
        bytes_per_token=layout.bytes_per_token,
        block_size=layout.block_size,
        num_blocks=blocks,
        blocks_per_request=per_request,
        tokens=data_parallel_size * int(max_concurrency * max_model_len),
        max_concurrency=data_parallel_size * max_concurrency,
    )


def longest_context(layout: KvLayout, *, available_bytes: int, at_most: int) -> int:
    """The longest max_model_len, up to `at_most`, of which the cache holds one request; or 0."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        cache = kv_cache(layout, available_bytes=available_bytes, max_model_len=middle)
        if cache.holds_one_request:
            low = middle
        else:
            high = middle - 1
    return low
