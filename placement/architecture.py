"""What a transformer of the Mistral family is made of: the numbers that memory and speed follow from."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from placement.spec import Spec


class MultiheadLatentAttention(Spec):
    """DeepSeek-style latent attention: one latent vector per token and layer is cached."""

    q_lora_rank: PositiveInt | None = Field(
        default=None, description="None: queries have no latent of their own (Large 4)."
    )
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt


class MixtureOfExperts(Spec):
    """The feed-forward part of the layers after the first `num_dense_layers`."""

    num_experts: PositiveInt = Field(description="Routed experts per layer.")
    num_experts_per_token: PositiveInt
    expert_intermediate_size: PositiveInt
    num_shared_experts: NonNegativeInt = 0
    num_dense_layers: NonNegativeInt = Field(
        default=0, description="Leading layers without experts."
    )
    router_bias: bool = Field(default=False, description="One number per expert (DeepSeek-V3).")
    expert_bias: bool = Field(default=False, description="Biases on the experts (gpt-oss).")


class VisionTower(Spec):
    """A Pixtral-style vision encoder with its projector."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    head_dim: PositiveInt
    patch_size: PositiveInt
    image_size: PositiveInt
    num_channels: PositiveInt = 3
    spatial_merge_size: PositiveInt = 1
    patch_merger: bool = Field(
        default=False, description="Neighbouring patches are merged by a linear layer."
    )
    adapter_bias: bool = False


class Architecture(Spec):
    """Shape of the language model; `None` for what a model does not have."""

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt | None = Field(default=None, description="Of the dense layers.")
    vocab_size: PositiveInt
    tied_embeddings: bool = False
    is_draft: bool = Field(
        default=False,
        description="EAGLE: its target's embedding and head, and a matrix that merges two inputs.",
    )
    attention_bias: bool = Field(default=False, description="Biases on q, k and v (Qwen2).")
    output_bias: bool = Field(default=False, description="Bias on o (gpt-oss).")
    attention_sinks: bool = Field(default=False, description="One number per head (gpt-oss).")
    qk_norm: bool = Field(default=False, description="RMS norms on the heads of q and k (Qwen3).")
    qk_norm_over_heads: bool = Field(
        default=False,
        description="The norms span all heads, so that ranks exchange their sums (MiniMax-M2).",
    )
    sliding_window: PositiveInt | None = Field(
        default=None, description="Tokens a layer looks back, but for full_attention_layers."
    )
    full_attention_layers: NonNegativeInt = Field(
        default=0, description="Layers that see everything although there is a sliding_window."
    )
    max_position: PositiveInt = Field(description="Longest context the positions allow, tokens.")
    mla: MultiheadLatentAttention | None = None
    moe: MixtureOfExperts | None = None
    vision: VisionTower | None = None

    def tokens_seen(self, context: float) -> float:
        """Tokens of the context that a layer looks at, on average over layers."""
        window = self.sliding_window
        if window is None:
            return context
        full = self.full_attention_layers / self.num_layers
        return full * context + (1 - full) * min(context, window)
