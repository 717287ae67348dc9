"""Between which shapes a KV cache can be handed over, how fast, and with which flags."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from placement.candidate import Candidate
from placement.catalogue import Checkpoint
from placement.engine_args import engine_args
from placement.kv_transfer import (
    RULES,
    attention_backend,
    cache_bytes,
    first_obstacle,
    handover_links,
)
from placement.replica_speed import replica_speed
from placement.shape import make_shape
from tests.placement.builders import (
    CATALOGUE,
    a_candidate,
    a_cpu_device,
    a_gpu_device,
    a_latent,
    a_model,
    an_architecture,
    experts,
)

GROUPED = a_model(architecture=an_architecture(num_heads=16, num_kv_heads=8))
LATENT = a_model(architecture=an_architecture(mla=a_latent(), head_dim=192, num_heads=16))
TWO_HEADS = a_model(architecture=an_architecture(num_heads=16, num_kv_heads=2))


def on(gpu: str, model: Any = GROUPED, **changes: Any) -> Candidate:
    return a_candidate(model, device=a_gpu_device(gpu), **changes)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (on("H100-SXM"), on("A100-80-SXM")),
        (on("H100-SXM", tensor_parallel_size=4), on("A100-80-SXM", tensor_parallel_size=2)),
        (on("L40S"), on("H100-SXM", tensor_parallel_size=8)),
        (on("RTX-5090"), on("RTX-4090")),
        (on("B200"), on("B300")),
        (on("V100-32"), on("V100-32")),
        (on("H100-SXM", LATENT, tensor_parallel_size=8), on("H200-SXM", LATENT)),
        (on("H100-SXM", LATENT), on("H200-SXM", LATENT, tensor_parallel_size=8)),
        (on("A100-80-SXM", LATENT), on("L40S", LATENT)),
        (on("H100-SXM", TWO_HEADS), on("H100-SXM", TWO_HEADS, tensor_parallel_size=8)),
        (on("H100-SXM", kv_cache_dtype="fp8"), on("H200-SXM", kv_cache_dtype="fp8")),
    ],
)
def test_a_cache_can_be_handed_over(prefill: Candidate, decode: Candidate) -> None:
    assert first_obstacle(prefill, decode) is None


@pytest.mark.parametrize(
    "architecture",
    [
        an_architecture(sliding_window=4096),
        an_architecture(sliding_window=4096, full_attention_layers=2),
        an_architecture(moe=experts()),
    ],
    ids=["windows", "hybrid", "experts"],
)
def test_windows_hybrid_caches_and_experts_are_no_obstacle(architecture: Any) -> None:
    model = a_model(architecture=architecture)

    assert first_obstacle(on("H100-SXM", model), on("A100-80-SXM", model)) is None


@pytest.mark.parametrize(
    ("rule", "prefill", "decode", "told"),
    [
        (
            "handover-needs-one-checkpoint",
            on("H100-SXM", checkpoint=Checkpoint(precision="fp8", source="x")),
            on("A100-80-SXM"),
            "fp8 weights",
        ),
        (
            "handover-needs-tensor-parallel-only",
            on("H100-SXM"),
            on("L40S", pipeline_parallel_size=2),
            "pipeline_parallel_size 2 on the decode side",
        ),
        (
            "handover-needs-tensor-parallel-only",
            on("H100-SXM", num_nodes=2),
            on("L40S"),
            "num_nodes 2 on the prefill side",
        ),
        (
            "handover-needs-tensor-parallel-only",
            on("H100-SXM", data_parallel_size=2),
            on("L40S"),
            "data_parallel_size 2",
        ),
        (
            "handover-needs-sizes-that-divide",
            on("H100-SXM", tensor_parallel_size=3),
            on("H100-SXM", tensor_parallel_size=2),
            "3 and 2",
        ),
        (
            "handover-needs-uncopied-heads",
            on("H100-SXM", TWO_HEADS, tensor_parallel_size=4),
            on("H100-SXM", TWO_HEADS, tensor_parallel_size=2),
            "copies of 2 K/V heads",
        ),
        (
            "handover-needs-one-kernel",
            on("H100-SXM", LATENT),
            on("A100-80-SXM", LATENT),
            "FLASH_ATTN_MLA",
        ),
        ("handover-needs-one-kernel", on("B200"), on("H100-SXM"), "FLASHINFER"),
        ("handover-needs-one-kernel", on("H100-SXM"), on("V100-32"), "TRITON_ATTN"),
        (
            "handover-needs-one-kernel",
            on("H100-SXM", kv_cache_dtype="fp8"),
            on("L40S", kv_cache_dtype="fp8"),
            "FLASHINFER",
        ),
        (
            "handover-needs-one-kernel",
            on("H100-SXM"),
            a_candidate(GROUPED, device=a_cpu_device()),
            "CPU_ATTN",
        ),
    ],
)
def test_what_stands_in_the_way_is_told_with_its_numbers(
    rule: str, prefill: Candidate, decode: Candidate, told: str
) -> None:
    found = first_obstacle(prefill, decode)

    assert found is not None
    assert found[0] == rule
    assert told in found[1]


def test_blocks_of_unlike_sizes_are_an_obstacle_where_the_kernel_is_none() -> None:
    narrow = on("H100-SXM", LATENT, kv_cache_dtype="fp8")

    reason = RULES["handover-needs-one-block-size"](narrow, on("H100-SXM", LATENT))

    assert reason == "blocks of 64 tokens on the prefill side and of 16 on the decode side"


def test_the_attention_backend_is_that_of_the_kind_of_gpu() -> None:
    latents = [attention_backend(on(gpu, LATENT)) for gpu in ("A100-80-SXM", "H100-SXM", "B200")]
    slot = replace(a_cpu_device(), amx=True)

    assert latents == ["TRITON_MLA", "FLASH_ATTN_MLA", "FLASHINFER_MLA"]
    assert attention_backend(on("RTX-PRO-6000", LATENT)) == "TRITON_MLA"
    assert attention_backend(on("H100-SXM", LATENT, kv_cache_dtype="fp8")) == "FLASHMLA"
    assert attention_backend(a_candidate(LATENT, device=slot)) == "AMX_MLA"
    assert attention_backend(a_candidate(LATENT, device=a_cpu_device())) == "CPU_MLA"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_as_many_bytes_of_a_cache_are_sent_whatever_the_ranks(ranks: int) -> None:
    decode = a_candidate(
        CATALOGUE.model("mistral-small-3.2"), tensor_parallel_size=ranks, role="decode"
    )

    sent = cache_bytes(decode, replica_speed(decode), 1000)

    assert sent == 1000 * 2 * 40 * 8 * 128 * 2  # keys and values, layers, heads, size, 16 bits


def test_each_rank_pulls_the_latent_and_a_window_is_all_that_is_sent() -> None:
    one, four = (on("H100-SXM", LATENT, tensor_parallel_size=ranks) for ranks in (1, 4))
    window = on("H100-SXM", a_model(architecture=an_architecture(sliding_window=512)))

    assert cache_bytes(four, replica_speed(four), 100) == 4 * cache_bytes(
        one, replica_speed(one), 100
    )
    speed = replica_speed(window)
    assert cache_bytes(window, speed, 4000) == cache_bytes(window, speed, 512)


def test_either_end_has_the_share_of_its_network_that_its_gpus_are_of_the_node() -> None:
    fast = replace(on("H100-SXM"), device=a_gpu_device(inter_node_bytes_per_s=50e9))
    slow = replace(on("A100-80-SXM"), device=a_gpu_device(inter_node_bytes_per_s=10e9))

    reading, writing = handover_links(fast, slow, shares=(0.25, 0.5), one_node=False)

    assert reading.s_per_byte == pytest.approx(1 / 12.5e9)
    assert writing.s_per_byte == pytest.approx(1 / 5e9)


def test_nvlink_of_one_node_is_faster_than_the_network_and_joins_pairs_of_gpus() -> None:
    two = on("H100-SXM", tensor_parallel_size=2)
    network, _ = handover_links(two, two, shares=(0.25, 0.25), one_node=False)

    one_node, _ = handover_links(two, two, shares=(0.25, 0.25), one_node=True)

    assert one_node.s_per_byte < network.s_per_byte / 10
    single, _ = handover_links(two, on("H100-SXM"), shares=(0.25, 0.125), one_node=True)
    assert single.s_per_byte == pytest.approx(2 * one_node.s_per_byte)


@pytest.mark.parametrize(
    ("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")]
)
def test_an_engine_in_a_role_is_told_so_and_computes_what_it_cannot_fetch(
    role: Any, kv_role: str
) -> None:
    (flag,) = [
        each for each in engine_args(a_candidate(role=role)) if each.startswith("--kv-transfer")
    ]

    name, _, config = flag.partition("=")
    assert name == "--kv-transfer-config"
    assert json.loads(config) == {
        "kv_connector": "NixlConnector",
        "kv_role": kv_role,
        "kv_load_failure_policy": "recompute",
    }


def test_whole_replicas_have_no_such_flag_and_roles_are_noted_as_experimental() -> None:
    assert not any("kv-transfer" in each for each in engine_args(a_candidate()))
    notes = make_shape(a_candidate(role="decode")).notes
    assert any(note.startswith("experimental") for note in notes)
    assert not any(note.startswith("experimental") for note in make_shape(a_candidate()).notes)
