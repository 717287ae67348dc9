from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.candidate import GIB, Candidate
from placement.kv_cache import (
    KvLayout,
    kv_bytes_per_token,
    kv_cache,
    layer_groups,
    longest_context,
)
from placement.memory import kv_layout, memory_use
from tests.placement.builders import (
    CATALOGUE,
    a_candidate,
    a_cpu_candidate,
    a_cpu_device,
    a_gpu_device,
    a_latent,
    a_model,
    an_architecture,
)


@pytest.mark.parametrize(
    ("model", "ranks", "expected"),
    [
        ("mistral-7b-v0.3", 1, 131_072),
        ("mixtral-8x7b", 1, 131_072),
        ("mistral-nemo-12b", 1, 163_840),
        ("mistral-small-3.2", 1, 163_840),
        ("mistral-small-3.2", 8, 20_480),
        ("mistral-small-3.2", 16, 20_480),
        ("mistral-large-3", 1, 70_272),
        ("mistral-large-3", 8, 70_272),
    ],
)
def test_bytes_per_token_and_rank(model: str, ranks: int, expected: int) -> None:
    architecture = CATALOGUE.model(model).architecture

    assert kv_bytes_per_token(architecture, tensor_parallel_size=ranks, element_bytes=2) == expected


def test_an_fp8_cache_takes_half() -> None:
    architecture = CATALOGUE.model("mistral-large-3").architecture

    assert kv_bytes_per_token(architecture, tensor_parallel_size=8, element_bytes=1) == 35_136


LATENT = a_model(architecture=an_architecture(mla=a_latent(), head_dim=192))


@pytest.mark.parametrize(
    ("candidate", "logged"),
    [
        (a_cpu_candidate(), 524_288),
        (a_cpu_candidate(tensor_parallel_size=2), 1_048_576),
        (a_cpu_candidate(dtype="float32"), 262_144),
        (a_cpu_candidate(LATENT), 233_008),
        (a_cpu_candidate(LATENT, tensor_parallel_size=2), 233_008),
    ],
)
def test_a_gib_on_the_cpu_holds_the_tokens_that_vllm_logs(
    candidate: Candidate, logged: int
) -> None:
    assert memory_use(candidate).kv.tokens == logged


def test_cpu_blocks_have_128_tokens_and_those_of_latents_16_unless_there_are_amx_tiles() -> None:
    amx = a_cpu_candidate(LATENT, device=a_cpu_device(amx=True))

    assert memory_use(a_cpu_candidate()).kv.block_size == 128
    assert memory_use(a_cpu_candidate(LATENT)).kv.block_size == 16
    assert memory_use(amx).kv.block_size == 128


@pytest.mark.parametrize(
    ("gpu", "kv_cache_dtype", "block_size"),
    [("H100-SXM", "auto", 16), ("H100-SXM", "fp8", 64), ("B200", "auto", 128), ("L4", "auto", 16)],
)
def test_latent_kernels_of_gpus_choose_the_block_size(
    gpu: str, kv_cache_dtype: str, block_size: int
) -> None:
    candidate = a_candidate(LATENT, device=a_gpu_device(gpu), kv_cache_dtype=kv_cache_dtype)

    assert memory_use(candidate).kv.block_size == block_size


def test_the_logged_size_follows_a_context_that_blocks_do_not_divide() -> None:
    layout = KvLayout(
        bytes_per_token=1024, block_size=16, sliding_window=None, max_in_flight_tokens=2048
    )

    cache = kv_cache(layout, available_bytes=100 * 16 * 1024, max_model_len=100)

    assert cache.num_blocks == 100
    assert cache.blocks_per_request == 7
    assert cache.tokens == int(100 / 7 * 100)


def test_a_window_holds_more_requests_than_full_attention_would() -> None:
    layout = KvLayout(
        bytes_per_token=131_072, block_size=16, sliding_window=4096, max_in_flight_tokens=4096
    )

    cache = kv_cache(layout, available_bytes=8 * GIB, max_model_len=32_768)

    assert cache.blocks_per_request == -(-(4095 + 4096) // 16) + 1
    assert cache.tokens == int(4096 / 513 * 32_768)


def test_steps_overlap_on_gpus_so_that_a_window_keeps_two_of_them() -> None:
    model = a_model(architecture=an_architecture(sliding_window=1024))

    on_gpu = memory_use(a_candidate(model, max_model_len=32_768, max_num_batched_tokens=2048)).kv
    on_cpu = memory_use(a_cpu_candidate(model, max_model_len=32_768)).kv

    assert on_gpu.blocks_per_request == -(-(1023 + 2 * 2048) // 16) + 1
    assert on_cpu.blocks_per_request == -(-(1023 + 2048) // 128) + 1


def test_one_block_is_never_handed_out() -> None:
    layout = KvLayout(
        bytes_per_token=1, block_size=16, sliding_window=None, max_in_flight_tokens=16
    )

    assert not kv_cache(layout, available_bytes=160, max_model_len=160).holds_one_request
    assert kv_cache(layout, available_bytes=176, max_model_len=160).holds_one_request


@given(
    available=st.integers(0, 10**7),
    window=st.none() | st.integers(1, 4096),
    at_most=st.integers(1, 100_000),
)
def test_the_longest_context_fits_and_one_token_more_does_not(
    available: int, window: int | None, at_most: int
) -> None:
    layout = KvLayout(
        bytes_per_token=64, block_size=16, sliding_window=window, max_in_flight_tokens=256
    )

    longest = longest_context(layout, available_bytes=available, at_most=at_most)

    def fits(tokens: int) -> bool:
        cache = kv_cache(layout, available_bytes=available, max_model_len=tokens)
        return cache.holds_one_request

    assert longest == 0 or fits(longest)
    assert longest == at_most or not fits(longest + 1)


@pytest.mark.parametrize(
    ("layers", "full", "groups"),
    [
        (36, 18, (1, 1, 18)),  # gpt-oss-120b
        (48, 12, (1, 3, 12)),  # one in four
        (25, 13, (1, 1, 13)),  # nearly half: the larger kind makes the size, the other is padded
        (62, 10, (1, 6, 10)),  # Gemma 3 27B
        (32, 0, (0, 1, 32)),
        (32, 32, (1, 0, 32)),
    ],
)
def test_layers_of_two_kinds_form_groups_of_as_many(
    layers: int, full: int, groups: tuple[int, int, int]
) -> None:
    architecture = an_architecture(
        num_layers=layers, sliding_window=128, full_attention_layers=full
    )

    assert layer_groups(architecture) == groups


def test_without_a_window_all_layers_are_one_group() -> None:
    assert layer_groups(an_architecture()) == (1, 0, 4)


def test_a_request_takes_blocks_of_every_group() -> None:
    model = a_model(architecture=an_architecture(sliding_window=1024, full_attention_layers=2))
    candidate = a_candidate(model, max_model_len=32_768, max_num_batched_tokens=2048)

    cache = memory_use(candidate).kv

    assert cache.bytes_per_token == 2 * 2 * 4 * 32 * 2  # of two layers, not four
    assert cache.blocks_per_request == 32_768 // 16 + -(-(1023 + 2 * 2048) // 16) + 1
    assert kv_layout(candidate).bytes_per_context_token == 2 * cache.bytes_per_token


def test_context_parallel_ranks_keep_their_share_of_a_request() -> None:
    layout = KvLayout(
        bytes_per_token=1,
        block_size=16,
        sliding_window=None,
        max_in_flight_tokens=16,
        decode_context_parallel_size=4,
    )

    assert layout.blocks_per_request(4096) == 64
    assert layout.blocks_per_request(4097) == 65
    assert layout.bytes_per_context_token == 1
    cache = kv_cache(layout, available_bytes=65 * 16, max_model_len=4096)
    assert cache.tokens == int(65 / 64 * 4096)


def test_data_parallel_copies_add_up() -> None:
    layout = KvLayout(
        bytes_per_token=1, block_size=16, sliding_window=None, max_in_flight_tokens=16
    )

    cache = kv_cache(layout, available_bytes=1600, max_model_len=160, data_parallel_size=4)

    assert cache.num_blocks == 100
    assert cache.tokens == 6400
    assert cache.max_concurrency == 40
