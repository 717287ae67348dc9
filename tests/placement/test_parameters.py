from __future__ import annotations

import pytest

from placement.parameters import count_parameters, rank_parameters
from tests.placement.builders import CATALOGUE, a_latent, an_architecture, experts


@pytest.mark.parametrize(
    ("model", "total"),
    [
        ("mistral-7b-v0.1", 7_241_732_096),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("mixtral-8x7b", 46_702_792_704),
        ("mistral-nemo-12b", 12_247_782_400),
        ("mistral-small-3.2-24b-2506", 24_011_361_280),
    ],
)
def test_a_model_has_exactly_the_parameters_of_its_checkpoint(model: str, total: int) -> None:
    assert count_parameters(CATALOGUE.model(model).architecture).total == total


def test_small_without_its_vision_tower_is_small_3() -> None:
    parameters = count_parameters(CATALOGUE.model("mistral-small-3.2").architecture)

    assert parameters.language == 23_572_403_200


def test_large_3_has_673_billion_in_text_and_two_and_a_half_in_vision() -> None:
    parameters = count_parameters(CATALOGUE.model("mistral-large-3").architecture)

    assert parameters.language == pytest.approx(673.37e9, rel=2e-4)
    assert parameters.vision == pytest.approx(2.5e9, rel=0.03)


@pytest.mark.parametrize(("model", "active"), [("mixtral-8x7b", 12.9e9), ("mistral-large-3", 41e9)])
def test_active_parameters_are_those_that_vendors_publish(model: str, active: float) -> None:
    parameters = count_parameters(CATALOGUE.model(model).architecture)

    assert parameters.active == pytest.approx(active, rel=0.02)


def test_all_parameters_of_a_dense_model_are_active() -> None:
    parameters = count_parameters(an_architecture())

    assert parameters.active == parameters.total


def test_tied_embeddings_count_once() -> None:
    untied, tied = an_architecture(), an_architecture(tied_embeddings=True)

    assert (
        count_parameters(untied).total - count_parameters(tied).total
        == untied.vocab_size * untied.hidden_size
    )


def test_leading_layers_of_a_mixture_may_be_dense() -> None:
    architecture = an_architecture(moe=experts(num_dense_layers=1, num_shared_experts=1))

    parameters = count_parameters(architecture)

    expert = 3 * 256 * 512
    assert parameters.feed_forward == expert
    assert parameters.experts == 3 * 8 * expert
    assert parameters.shared_experts == 3 * expert
    assert parameters.router == 3 * 256 * 8


def test_two_ranks_hold_one_model_and_what_both_need() -> None:
    architecture = an_architecture()
    whole = count_parameters(architecture)

    rank = rank_parameters(architecture, tensor_parallel_size=2, expert_parallel=False)

    assert 2 * rank.attention == whole.attention
    assert 2 * rank.feed_forward == whole.feed_forward
    assert rank.norms == whole.norms


def test_kv_heads_are_copied_when_there_are_more_ranks() -> None:
    architecture = an_architecture()  # 4 K/V heads

    rank = rank_parameters(architecture, tensor_parallel_size=8, expert_parallel=False)

    assert rank.attention == 4 * (2 * 256 * 32 + 2 * 256 * 32)


def test_latents_are_projected_on_every_rank() -> None:
    architecture = an_architecture(mla=a_latent())
    per_head = 128 * 192 + 512 * 256 + 256 * 128

    rank = rank_parameters(architecture, tensor_parallel_size=4, expert_parallel=False)

    assert rank.attention == 4 * (256 * (128 + 512 + 64) + 2 * per_head)


def test_whole_experts_are_spread_with_the_remainder_on_the_largest_rank() -> None:
    architecture = an_architecture(moe=experts(num_experts=6))

    rank = rank_parameters(architecture, tensor_parallel_size=4, expert_parallel=True)

    assert rank.experts == 4 * 2 * 3 * 256 * 512


def test_the_vocabulary_is_padded_to_64_rows_before_it_is_split() -> None:
    architecture = an_architecture(vocab_size=32001)

    rank = rank_parameters(architecture, tensor_parallel_size=2, expert_parallel=False)

    assert rank.embedding == 32064 // 2 * 256
