"""How many parameters a model has, in all and on one rank: exact to the integer."""

from __future__ import annotations

from dataclasses import dataclass

from placement.architecture import (
    Architecture,
    MixtureOfExperts,
    MultiheadLatentAttention,
    VisionTower,
)
from placement.pipeline import Stage, whole_model

VOCABULARY_PADDING = 64  # vLLM DEFAULT_VOCAB_PADDING_SIZE, vocab_parallel_embedding.py


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters by the role of their tensors, which decides how they are stored."""

    embedding: int
    head: int  # 0 when it is tied to the embedding
    attention: int
    feed_forward: int  # of the dense layers
    experts: int  # routed
    idle_experts: int  # of them, those that a token does not use
    shared_experts: int
    router: int
    norms: int
    vision: int  # tower and projector

    @property
    def language(self) -> int:
        """The language model alone."""
        return (
            self.embedding
            + self.head
            + self.attention
            + self.feed_forward
            + self.experts
            + self.shared_experts
            + self.router
            + self.norms
        )

    @property
    def total(self) -> int:
        """Everything in the checkpoint."""
        return self.language + self.vision

    @property
    def active(self) -> int:
        """Parameters that work on a token, as vendors count them.

        A dense model's are all of them. A mixture of experts counts everything but the experts that
        are not chosen and the input embedding, of which a token reads one row: Mixtral-8x7B 12.7 B
        (published 12.9), Mistral Large 3 41.6 B (published 39 B + 2.5 B vision).
        """
        if self.experts == 0:
            return self.total
        return self.total - self.embedding - self.idle_experts


def count_parameters(architecture: Architecture) -> Parameters:
    """Parameters of the whole model.

    Equal to the Hugging Face classes to the integer: Mistral-7B-v0.1 7,241,732,096,
    Mixtral-8x7B 46,702,792,704, Mistral-Small-24B 23,572,403,200.
    """
    return _count(architecture, _Cut(stage=whole_model(architecture.num_layers)))


@dataclass(frozen=True, slots=True)
class _Cut:
    """What a rank gets of the whole."""

    stage: Stage
    tensor_parallel_size: int = 1
    expert_shards: int = 1  # ranks over which each expert's matrices are cut
    experts_per_rank: int | None = None  # whole ones; None: a shard of each
    vocabulary_padding: int = 1


def rank_parameters(
    architecture: Architecture,
    *,
    tensor_parallel_size: int,
    expert_parallel: bool,
    data_parallel_size: int = 1,
    num_redundant_experts: int = 0,
    stage: Stage | None = None,
) -> Parameters:
    """Parameters that one vLLM 0.32 rank holds; the largest rank of `stage` where they differ.

    Split over `tensor_parallel_size` ranks: attention, feed-forward, vocabulary (padded to 64
    rows), vision tower. Whole on every rank: MLA's q_a and kv_a (`disable_tp=True`,
    deepseek_v2.py), router, norms, the projector (ReplicatedLinear, pixtral.py), and K/V heads
    once there are more ranks than heads (config/model.py get_num_kv_heads). Routed experts are
    cut over tensor x data parallel ranks, or with `expert_parallel` spread whole over them, the
    remainder on some ranks (fused_moe/config.py). The first stage has the embedding, the last the
    head and the final norm; tied, both have it (llama.py); mixtures with grouped heads have it on
    every stage (mixtral.py). The vision tower is on every stage
    (pixtral.py does not ask for the rank).
    """
    shards = tensor_parallel_size * data_parallel_size
    experts = None
    if architecture.moe is not None and expert_parallel:
        experts = -(-(architecture.moe.num_experts + num_redundant_experts) // shards)
    cut = _Cut(
        stage=stage or whole_model(architecture.num_layers),
        tensor_parallel_size=tensor_parallel_size,
        expert_shards=shards,
        experts_per_rank=experts,
        vocabulary_padding=VOCABULARY_PADDING,
    )
    return _count(architecture, cut)


def _count(architecture: Architecture, cut: _Cut) -> Parameters:
    hidden, stage, ranks = architecture.hidden_size, cut.stage, cut.tensor_parallel_size
    padding = cut.vocabulary_padding
    vocabulary = -(-architecture.vocab_size // padding) * padding // ranks * hidden
    merger = 0
    if architecture.is_draft:  # vLLM copies embedding and head from the target
        vocabulary, merger = 0, 2 * hidden**2
    tied = architecture.tied_embeddings
    # vLLM's classes of mixtures with grouped heads (mixtral.py, qwen3_moe.py, gpt_oss.py) make the
    # embedding on every stage; a CPU log of Mixtral in two stages shows it.
    everywhere = architecture.moe is not None and architecture.mla is None
    embeds = stage.is_first or everywhere or (tied and stage.is_last)
    moe, dense_layers = architecture.moe, stage.num_layers
    experts = idle = shared = router = 0
    if moe is not None:
        dense_layers = min(stage.num_layers, max(0, moe.num_dense_layers - stage.first_layer))
        sparse_layers = stage.num_layers - dense_layers
        expert = _expert(moe, hidden)
        experts = moe.num_experts * expert // cut.expert_shards
        if cut.experts_per_rank is not None:
            experts = cut.experts_per_rank * expert
        experts *= sparse_layers
        idle = experts * (moe.num_experts - moe.num_experts_per_token) // moe.num_experts
        shared = 3 * hidden * moe.expert_intermediate_size * moe.num_shared_experts
        shared = sparse_layers * shared // ranks
        router = sparse_layers * moe.num_experts * (hidden + moe.router_bias)
    return Parameters(
        embedding=vocabulary if embeds else 0,
        head=vocabulary if stage.is_last and not tied else 0,
        attention=stage.num_layers * _attention(architecture, ranks),
        feed_forward=merger
        + dense_layers * 3 * hidden * (architecture.intermediate_size or 0) // ranks,
        experts=experts,
        idle_experts=idle,
        shared_experts=shared,
        router=router,
        norms=stage.num_layers * _layer_norms(architecture) + hidden * stage.is_last,
        vision=_vision(architecture.vision, hidden, ranks) if architecture.vision else 0,
    )


def _expert(moe: MixtureOfExperts, hidden: int) -> int:
    biases = 2 * moe.expert_intermediate_size + hidden if moe.expert_bias else 0
    return 3 * hidden * moe.expert_intermediate_size + biases


def local_kv_heads(architecture: Architecture, tensor_parallel_size: int) -> int:
    """K/V heads on one rank: at least one, so heads are copied when there are more ranks."""
    return max(1, architecture.num_kv_heads // tensor_parallel_size)


def _attention(architecture: Architecture, ranks: int) -> int:
    hidden, heads = architecture.hidden_size, architecture.num_heads
    if architecture.mla is not None:
        return _latent_attention(architecture.mla, hidden, heads, ranks)
    query = heads * architecture.head_dim // ranks
    key = local_kv_heads(architecture, ranks) * architecture.head_dim
    biases = query + 2 * key if architecture.attention_bias else 0
    if architecture.output_bias:
        biases += hidden
    if architecture.attention_sinks:
        biases += heads // ranks
    return 2 * hidden * query + 2 * hidden * key + biases


def _latent_attention(mla: MultiheadLatentAttention, hidden: int, heads: int, ranks: int) -> int:
    on_every_rank = hidden * ((mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_rope_head_dim)
    query = (mla.q_lora_rank or hidden) * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    key_value = mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
    output = hidden * mla.v_head_dim
    return on_every_rank + heads * (query + key_value + output) // ranks


def _layer_norms(architecture: Architecture) -> int:
    norms = 2 * architecture.hidden_size
    if architecture.mla is not None:
        norms += (architecture.mla.q_lora_rank or 0) + architecture.mla.kv_lora_rank
    if architecture.qk_norm_over_heads:
        norms += (architecture.num_heads + architecture.num_kv_heads) * architecture.head_dim
    elif architecture.qk_norm:
        norms += 2 * architecture.head_dim
    return norms


def _vision(vision: VisionTower, text_hidden: int, ranks: int) -> int:
    hidden = vision.hidden_size
    attention = 4 * hidden * vision.num_heads * vision.head_dim
    feed_forward = 3 * hidden * vision.intermediate_size
    patches = vision.num_channels * vision.patch_size**2 * hidden
    norms = (2 * vision.num_layers + 1) * hidden
    projector = hidden * text_hidden + text_hidden**2
    if vision.adapter_bias:
        projector += 2 * text_hidden
    if vision.patch_merger:  # merges neighbours, after a norm
        projector += vision.spatial_merge_size**2 * hidden**2 + hidden
    layers = vision.num_layers * (attention + feed_forward) // ranks
    return layers + patches + norms + projector
