from __future__ import annotations

import pytest

from placement.gguf_mix import gguf_tensors
from placement.parameters import count_parameters
from placement.weight_bytes import GGUF_BITS
from tests.placement.builders import CATALOGUE, an_architecture, experts


# Sizes of real files, from their repositories: to the byte, or as far as they are rounded.
@pytest.mark.parametrize(
    ("model", "precision", "size", "within"),
    [
        ("mistral-7b-v0.3", "q2_k", 2_722_877_600, 5e-4),
        ("mistral-7b-v0.3", "q3_k_m", 3_522_941_088, 5e-4),
        ("mistral-7b-v0.3", "q4_k_m", 4_372_811_936, 5e-4),
        ("mistral-7b-v0.3", "q5_k_m", 5_136_175_264, 5e-4),
        ("mistral-7b-v0.3", "q6_k", 5_947_248_800, 5e-4),
        ("mistral-7b-v0.3", "q8_0", 7_702_565_024, 5e-4),
        ("mistral-large-2407", "q2_k", 45.2e9, 2e-3),
        ("mistral-large-2407", "q4_k_m", 73.3e9, 2e-3),
        ("mixtral-8x7b", "q4_k_m", 28.4e9, 3e-3),
        ("mixtral-8x7b", "q5_0", 32.2e9, 2e-3),
        ("mistral-small-3-24b-2501", "q4_1", 13.85 * 2**30, 1e-3),
        ("mistral-small-3-24b-2501", "q4_k_l", 13.81 * 2**30, 1e-3),
        ("mistral-small-3-24b-2501", "q2_k_l", 8.89 * 2**30, 1e-3),
    ],
)
def test_a_file_has_the_size_that_llama_cpp_gives_it(
    model: str, precision: str, size: float, within: float
) -> None:
    tensors = gguf_tensors(CATALOGUE.model(model).architecture, precision)

    assert tensors is not None
    assert tensors.total == pytest.approx(size, rel=within)


def test_unquantised_files_have_every_parameter() -> None:
    architecture = an_architecture()
    tensors = gguf_tensors(architecture, "fp32")

    assert tensors is not None
    assert tensors.total == 4 * count_parameters(architecture).total


def test_a_format_with_an_importance_matrix_is_not_computed() -> None:
    assert gguf_tensors(an_architecture(), "iq2_xxs") is None


def test_a_tied_embedding_is_as_wide_as_a_head_and_counts_once() -> None:
    tied = gguf_tensors(an_architecture(tied_embeddings=True), "q4_k_m")
    untied = gguf_tensors(an_architecture(), "q4_k_m")

    assert tied is not None
    assert untied is not None
    assert tied.embedding == untied.head - 4 * 256
    assert tied.head == 4 * 256  # the last norm


def test_experts_stand_apart_from_what_every_token_uses() -> None:
    architecture = an_architecture(moe=experts(num_dense_layers=1))
    tensors = gguf_tensors(architecture, "q8_0")

    assert tensors is not None
    assert tensors.expert_layers[0] == 0
    assert tensors.expert_layers[1] == 3 * 8 * 256 * 512 * 34 // 32


@pytest.mark.parametrize("precision", sorted(GGUF_BITS))
def test_the_mix_is_near_the_average_bits_of_llama_8b(precision: str) -> None:
    llama = an_architecture(
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
    )
    tensors = gguf_tensors(llama, precision)
    if tensors is None:
        return

    bits = 8 * tensors.total / count_parameters(llama).total

    assert bits == pytest.approx(GGUF_BITS[precision], rel=0.04)
