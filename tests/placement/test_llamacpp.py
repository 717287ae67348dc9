from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.architecture import Architecture
from placement.candidate import GIB
from placement.catalogue import Checkpoint
from placement.errors import ConfigError
from placement.gguf_weights import GgufWeights, gguf_size_bytes, weights_by_arithmetic
from placement.llamacpp import (
    CONTEXT_BYTES,
    RESERVE_BYTES,
    LlamaTask,
    compute_buffer_bytes,
    kv_bytes_per_layer_token,
    largest_context,
    place,
)
from placement.parameters import count_parameters
from tests.placement.builders import CATALOGUE, a_latent, an_architecture, experts

SMALL = CATALOGUE.model("mistral-small-3-24b-2501").architecture
LARGE_3 = CATALOGUE.model("mistral-large-3-675b-2512").architecture
MIXTRAL = CATALOGUE.model("mixtral-8x7b").architecture


def a_gguf(precision: str = "q4_k_m", **changes: Any) -> Checkpoint:
    return Checkpoint(precision=precision, format="gguf", source="m.gguf", **changes)


def a_task(architecture: Architecture = SMALL, **changes: Any) -> LlamaTask:
    checkpoint = changes.pop("checkpoint", a_gguf())
    weights = weights_by_arithmetic(architecture, checkpoint)
    return LlamaTask(
        **{"architecture": architecture, "weights": weights, "context": 4096, **changes}
    )


def total(weights: GgufWeights) -> int:
    head = 0 if weights.head_is_embedding else weights.head
    return weights.embedding + head + sum(each.dense + each.experts for each in weights.layers)


@pytest.mark.parametrize(
    ("architecture", "element_bytes"),
    [
        (SMALL, 2 * 8 * 128 * 2),
        (MIXTRAL, 2 * 8 * 128 * 2),
        (LARGE_3, (512 + 64) * 2),  # the latent once, no values
        (an_architecture(mla=a_latent()), (512 + 64) * 2),
    ],
)
def test_a_layer_caches_keys_and_values_or_one_latent(
    architecture: Architecture, element_bytes: int
):
    assert kv_bytes_per_layer_token(architecture) == element_bytes


def test_q8_0_caches_34_bytes_for_32_numbers():
    assert kv_bytes_per_layer_token(SMALL, "fp8") == 2 * 8 * 128 * 34 // 32


def test_a_window_saves_nothing_in_llama_cpp():
    windowed = an_architecture(sliding_window=1024)

    assert kv_bytes_per_layer_token(windowed) == kv_bytes_per_layer_token(an_architecture())


# What llama.cpp (xllamacpp 2026.10.11549) logged for models of these sizes, MiB.
@pytest.mark.parametrize(
    ("hidden", "width", "context", "used", "logged"),
    [
        (256, 512, 4096, 0, 9.52),
        (256, 4096, 4096, 0, 30.52),
        (1024, 4096, 4096, 0, 38.02),
        (1024, 3584, 4096, 0, 35.02),
        (256, 512, 1024, 0, 6.52),
        (256, 512, 4096, 2, 12.52),
        (1024, 3584, 4096, 2, 56.02),
    ],
)
def test_compute_buffers_are_those_of_a_log(
    hidden: int, width: int, context: int, used: int, logged: float
):
    moe = experts(expert_intermediate_size=width, num_experts_per_token=used) if used else None
    architecture = an_architecture(
        hidden_size=hidden, intermediate_size=width, vocab_size=1024, moe=moe
    )

    found = compute_buffer_bytes(a_task(architecture, context=context))

    assert found / 1024**2 == pytest.approx(logged, abs=0.02)


def test_arithmetic_keeps_the_size_of_the_file():
    checkpoint = a_gguf(size_bytes=14_330_000_000)

    assert total(weights_by_arithmetic(SMALL, checkpoint)) == pytest.approx(14.33e9, rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "gigabytes"), [("q4_k_m", 14.33), ("q5_k_m", 16.76), ("q6_k", 19.35)]
)
def test_sizes_by_bits_per_weight_are_within_two_percent_of_real_files(
    precision: str, gigabytes: float
):
    assert gguf_size_bytes(SMALL, a_gguf(precision)) / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_a_head_in_a_coarse_file_is_stored_finer():
    weights = weights_by_arithmetic(SMALL, a_gguf("q4_k_m"))

    assert weights.head > 1.2 * weights.embedding


def test_vision_is_not_in_the_file():
    with_vision = CATALOGUE.model("mistral-small-3.2-24b-2506").architecture

    assert gguf_size_bytes(with_vision, a_gguf("q8_0")) == gguf_size_bytes(SMALL, a_gguf("q8_0"))


def test_a_format_that_is_not_gguf_has_no_bits():
    with pytest.raises(ConfigError, match="fp8 is no GGUF format"):
        gguf_size_bytes(SMALL, a_gguf("fp8"))


def test_everything_goes_to_the_gpu_when_there_is_room():
    placed = place(a_task(), memory_bytes=24 * GIB, num_gpus=1)

    assert placed is not None
    assert placed.layers == (40,)
    assert placed.head_on_gpu
    assert placed.host_bytes < 2 * GIB  # the embedding and the process


def test_the_last_layers_and_the_head_go_first():
    task = a_task(checkpoint=a_gguf("fp32"), context=512)

    placed = place(task, memory_bytes=45_000_000_000, num_gpus=1)

    assert placed is not None
    assert placed.gpu_layers == 18
    host_layers = sum(layer.dense for layer in task.weights.layers[:22])
    assert placed.host_bytes > host_layers + task.weights.embedding


def test_several_gpus_share_layers_evenly_with_the_head_on_the_last():
    placed = place(a_task(), memory_bytes=24 * GIB, num_gpus=2)

    assert placed is not None
    assert placed.layers == (21, 19)


def test_experts_of_few_layers_stay_in_host_memory_before_whole_layers_do():
    task = a_task(MIXTRAL)

    placed = place(task, memory_bytes=24 * GIB, num_gpus=1)

    assert placed is not None
    assert placed.gpu_layers == 32
    assert 0 < placed.cpu_moe_layers < 32
    at_home = sum(layer.experts for layer in task.weights.layers[: placed.cpu_moe_layers])
    assert placed.host_bytes > at_home


def test_a_mixture_whose_dense_parts_do_not_fit_keeps_all_experts_at_home():
    placed = place(a_task(LARGE_3), memory_bytes=12 * GIB, num_gpus=1)

    assert placed is not None
    assert 0 < placed.gpu_layers < 61
    assert placed.cpu_moe_layers == 61


def test_a_gpu_that_cannot_hold_the_head_gets_nothing():
    assert place(a_task(checkpoint=a_gguf("fp32")), memory_bytes=3 * GIB, num_gpus=1) is None


def test_without_gpus_everything_is_in_host_memory():
    task = a_task()

    placed = place(task, memory_bytes=0, num_gpus=0)

    assert placed is not None
    assert placed.gpus == ()
    assert placed.host_bytes > total(task.weights)


def test_the_largest_context_still_fits_and_more_does_not():
    task, memory = a_task(), 24 * GIB

    longest = largest_context(task, memory_bytes=memory, num_gpus=1, at_most=131072)

    assert longest % 256 == 0
    fitting = place(replace(task, context=longest), memory_bytes=memory, num_gpus=1)
    beyond = place(replace(task, context=longest + 256), memory_bytes=memory, num_gpus=1)
    assert fitting is not None
    assert fitting.gpu_layers == 40
    assert beyond is not None
    assert beyond.gpu_layers < 40


@settings(max_examples=150, deadline=None)
@given(
    memory_gib=st.floats(0.5, 200),
    num_gpus=st.integers(1, 9),
    context=st.integers(1, 300_000),
    precision=st.sampled_from(["q2_k", "q4_k_m", "q8_0", "bf16", "fp32"]),
    architecture=st.sampled_from([SMALL, MIXTRAL, LARGE_3, an_architecture()]),
    share=st.floats(0.1, 1.0),
)
def test_no_gpu_ever_holds_more_than_it_has(
    architecture: Architecture, memory_gib: float, num_gpus: int, share: float, **limits: Any
):
    checkpoint = a_gguf(limits["precision"])
    task = a_task(architecture, context=limits["context"], checkpoint=checkpoint)
    memory = int(memory_gib * GIB)

    placed = place(task, memory_bytes=memory, num_gpus=num_gpus, share=share)

    if placed is None:
        return
    assert len(placed.gpus) == num_gpus
    assert 0 <= placed.gpu_layers <= architecture.num_layers
    kept = 0
    for gpu in placed.gpus:
        used = gpu.weights_bytes + gpu.kv_cache_bytes + gpu.activation_bytes + gpu.non_torch_bytes
        assert min(gpu.weights_bytes, gpu.kv_cache_bytes) >= 0
        if gpu.weights_bytes:
            assert used + RESERVE_BYTES <= memory
            assert used <= memory * share + 1
        kept += gpu.weights_bytes
    assert placed.host_bytes > CONTEXT_BYTES // 10
    assert kept <= total(task.weights) + task.weights.head


def test_parameters_and_bits_agree():
    weights = weights_by_arithmetic(SMALL, a_gguf("fp32"))

    assert total(weights) == pytest.approx(4 * count_parameters(SMALL).total, rel=1e-4)
