"""Bytes of a GGUF model by where llama.cpp puts them: from its header, or by arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass

from placement.architecture import Architecture
from placement.catalogue import Checkpoint, Precision
from placement.errors import ConfigError
from placement.gguf_mix import GgufTensors, gguf_tensors
from placement.headers.gguf import GgufHeader
from placement.parameters import Parameters, count_parameters
from placement.weight_bytes import GGUF_BITS

_FULL_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"ffn_(up|down|gate_up|gate)_(ch|)exps")  # as common/fit.cpp and -ot say
_Q6_K_BYTES = 210 / 256


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Bytes of one layer."""

    dense: int  # attention, norms, router, shared experts, dense feed-forward
    experts: int  # routed


@dataclass(frozen=True, slots=True)
class GgufWeights:
    """Bytes of the whole model."""

    embedding: int
    head: int  # with the last norm
    layers: tuple[LayerWeights, ...]
    head_is_embedding: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether there are routed experts to leave in host memory."""
        return any(layer.experts for layer in self.layers)


def weights_from_header(header: GgufHeader, architecture: Architecture) -> GgufWeights:
    """Exact bytes, tensor by tensor.

    Raises:
        ConfigError: the tensors are not those of a language model with that many layers.
    """
    dense, experts = [0] * architecture.num_layers, [0] * architecture.num_layers
    embedding = head = norm = 0
    for tensor in header.tensors:
        layer = _LAYER.fullmatch(tensor.name)
        if layer is not None:
            index = int(layer[1])
            if index >= architecture.num_layers:
                raise ConfigError(
                    f"{header.name}: {tensor.name} in a model of {architecture.num_layers} layers"
                )
            kind = experts if _EXPERTS.match(layer[2]) else dense
            kind[index] += tensor.num_bytes
        elif tensor.name == "token_embd.weight":
            embedding = tensor.num_bytes
        elif tensor.name == "output.weight":
            head = tensor.num_bytes
        else:
            norm += tensor.num_bytes
    if embedding == 0 or not all(dense):
        raise ConfigError(f"{header.name}: lacks token_embd.weight or whole layers")
    return GgufWeights(
        embedding=embedding,
        head=(head or embedding) + norm,
        layers=tuple(map(LayerWeights, dense, experts)),
        head_is_embedding=head == 0,
    )


def weights_by_arithmetic(architecture: Architecture, checkpoint: Checkpoint) -> GgufWeights:
    """Bytes from a file's size, or else from the format's mix or bits per weight.

    Vision is not in it: llama.cpp keeps that in a second file. A known size is shared out as the
    format's mix does (gguf_mix.py); of formats whose mix is not known the head is taken to be Q6_K
    (llama-quant.cpp, output tensor), and what is left is spread evenly over the rest.
    """
    mix = gguf_tensors(architecture, checkpoint.precision)
    if mix is not None:
        return _scaled(mix, gguf_size_bytes(architecture, checkpoint), architecture)
    counted = count_parameters(architecture.model_copy(update={"vision": None}))
    size = gguf_size_bytes(architecture, checkpoint)
    per_weight = size / counted.total
    head = per_weight * counted.head
    if per_weight < _Q6_K_BYTES and checkpoint.precision not in _FULL_BITS:
        head = _Q6_K_BYTES * counted.head
    others = max(1, counted.total - counted.head)
    per_weight = max(0.0, size - head) / others
    embedding = int(per_weight * counted.embedding)
    tied = counted.head == 0
    return GgufWeights(
        embedding=embedding,
        head=(embedding if tied else int(head)) + 4 * architecture.hidden_size,
        layers=_spread(architecture, counted, per_weight),
        head_is_embedding=tied,
    )


def _scaled(mix: GgufTensors, size: int, architecture: Architecture) -> GgufWeights:
    share, tied = size / max(1, mix.total), architecture.tied_embeddings
    embedding = int(mix.embedding * share)
    return GgufWeights(
        embedding=embedding,
        head=int(mix.head * share) + (embedding if tied else 0),
        layers=tuple(
            LayerWeights(int(dense * share), int(experts * share))
            for dense, experts in zip(mix.dense_layers, mix.expert_layers, strict=True)
        ),
        head_is_embedding=tied,
    )


def gguf_size_bytes(architecture: Architecture, checkpoint: Checkpoint) -> int:
    """Of the language model's file: as known, by the format's mix, or bits per weight."""
    if checkpoint.size_bytes is not None:
        return checkpoint.size_bytes
    tensors = gguf_tensors(architecture, checkpoint.precision)
    if tensors is not None and checkpoint.bits_per_weight is None:
        return tensors.total
    language = count_parameters(architecture.model_copy(update={"vision": None})).total
    return int(language * gguf_bits(checkpoint) / 8)


def gguf_bits(checkpoint: Checkpoint) -> float:
    """Bits per weight of a whole file in this format."""
    known: Precision = checkpoint.precision
    bits = checkpoint.bits_per_weight or GGUF_BITS.get(known) or _FULL_BITS.get(known)
    if bits is None:
        raise ConfigError(f"{known} is no GGUF format; known: {', '.join(sorted(GGUF_BITS))}")
    return bits


def _spread(
    architecture: Architecture, counted: Parameters, per_weight: float
) -> tuple[LayerWeights, ...]:
    """Layers alike, except that leading layers of a mixture have a dense feed-forward."""
    layers, moe = architecture.num_layers, architecture.moe
    num_dense = layers if moe is None else min(moe.num_dense_layers, layers)
    shared = (counted.attention + counted.norms) / layers
    dense = shared + (counted.feed_forward / num_dense if num_dense else 0)
    sparse = max(1, layers - num_dense)
    routed = int(per_weight * counted.experts / sparse)
    beside = shared + (counted.shared_experts + counted.router) / sparse
    return tuple(
        LayerWeights(int(per_weight * dense), 0)
        if index < num_dense
        else LayerWeights(int(per_weight * beside), routed)
        for index in range(layers)
    )
