from __future__ import annotations

from typing import Any

import pytest

from placement.candidate import GIB, Candidate
from placement.catalogue import Checkpoint, ModelSpec
from placement.legality import first_rejection
from tests.placement.builders import (
    CATALOGUE,
    a_candidate,
    a_cpu_candidate,
    a_cpu_device,
    a_gpu_device,
    a_model,
    an_architecture,
    experts,
)


def in_precision(precision: str, **changes: Any) -> ModelSpec:
    checkpoint = Checkpoint(precision=precision, source="x")
    return a_model(checkpoints=(checkpoint,), **changes)


V100, H100, L4 = a_gpu_device("V100-32"), a_gpu_device("H100-SXM"), a_gpu_device("L4")
MIXTURE = a_model(architecture=an_architecture(moe=experts()))


@pytest.mark.parametrize(
    ("rule", "candidate", "numbers"),
    [
        ("engine-has-no-loader", a_candidate(in_precision("q4_k_m")), "q4_k_m"),
        ("tensor-parallel-exceeds-node", a_candidate(tensor_parallel_size=16), "16 GPUs"),
        ("heads-not-divisible", a_candidate(tensor_parallel_size=3), "8 attention heads"),
        (
            "kv-heads-not-divisible",
            a_candidate(
                a_model(architecture=an_architecture(num_heads=12, num_kv_heads=4)),
                tensor_parallel_size=6,
            ),
            "4 K/V heads",
        ),
        (
            "feed-forward-not-divisible",
            a_candidate(
                a_model(architecture=an_architecture(intermediate_size=510)),
                tensor_parallel_size=4,
            ),
            "intermediate_size 510",
        ),
        ("expert-parallel-needs-experts", a_candidate(expert_parallel=True), "nano is dense"),
        (
            "expert-parallel-needs-experts",
            a_candidate(
                a_model(architecture=an_architecture(moe=experts(num_experts=4))),
                expert_parallel=True,
                tensor_parallel_size=8,
            ),
            "4 experts are too few for 8",
        ),
        ("precision-needs-gpu", a_cpu_candidate(in_precision("fp8")), "fp8"),
        ("precision-needs-newer-gpu", a_candidate(in_precision("fp8"), device=V100), "7.5"),
        ("precision-needs-newer-gpu", a_candidate(in_precision("nvfp4"), device=V100), "7.0"),
        ("precision-needs-newer-gpu", a_candidate(in_precision("awq"), device=V100), "7.5"),
        ("dtype-not-supported", a_candidate(device=V100, dtype="bfloat16"), "8.0"),
        ("dtype-not-supported", a_candidate(in_precision("fp8"), dtype="float32"), "16 bits"),
        ("context-too-long", a_candidate(max_model_len=40_000), "40,000 is more than"),
        ("batch-below-num-seqs", a_candidate(max_num_batched_tokens=100), "256"),
        ("gpu-memory-unknown", a_candidate(device=a_gpu_device(memory_bytes=None)), "H100"),
        ("weights-exceed-memory", a_candidate(CATALOGUE.model("mixtral")), "86.99 GiB of weights"),
        (
            "weights-exceed-memory",
            a_cpu_candidate(device=a_cpu_device(memory_bytes=2 * GIB)),
            "1.00 GiB of KV cache",
        ),
        (
            "kv-cache-below-one-request",
            a_cpu_candidate(
                device=a_cpu_device(kv_cache_budget_bytes=GIB // 64), max_model_len=16_384
            ),
            "enough for 8,064 tokens",
        ),
    ],
)
def test_a_rule_is_broken_and_says_so_with_numbers(
    rule: str, candidate: Candidate, numbers: str
) -> None:
    rejection = first_rejection(candidate)

    assert rejection is not None
    assert rejection.rule == rule
    assert numbers in rejection.reason


@pytest.mark.parametrize(
    "candidate",
    [
        a_candidate(),
        a_cpu_candidate(),
        a_candidate(device=V100),
        a_candidate(in_precision("gptq"), device=V100),
        a_candidate(in_precision("nvfp4"), device=L4),
        a_candidate(MIXTURE, tensor_parallel_size=8, expert_parallel=True),
        a_candidate(tensor_parallel_size=8),
        a_cpu_candidate(dtype="float32"),
        a_cpu_candidate(in_precision("fp32")),
    ],
)
def test_what_vllm_runs_is_legal(candidate: Candidate) -> None:
    assert first_rejection(candidate) is None


def test_a_rejection_describes_its_shape() -> None:
    rejection = first_rejection(a_candidate(tensor_parallel_size=16))

    assert rejection is not None
    assert rejection.shape["gpu"] == "H100-SXM"
    assert rejection.shape["tensor_parallel_size"] == 16


def test_large_3_in_fp8_does_not_fit_on_eight_gpus_of_80_gb_but_nvfp4_does() -> None:
    model = CATALOGUE.model("mistral-large-3")
    fp8, nvfp4, _ = model.checkpoints
    common = {"tensor_parallel_size": 8, "expert_parallel": True, "device": H100}

    too_big = first_rejection(a_candidate(model, checkpoint=fp8, **common))

    assert too_big is not None
    assert too_big.rule == "weights-exceed-memory"
    assert first_rejection(a_candidate(model, checkpoint=nvfp4, **common)) is None
