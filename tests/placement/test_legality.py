from __future__ import annotations

from typing import Any

import pytest

from placement.candidate import GIB, Candidate
from placement.catalogue import Checkpoint, ModelSpec
from placement.legality import RULES, first_rejection
from placement.serving_features import ExpertBalance, LoraLimits
from tests.placement.builders import (
    CATALOGUE,
    a_candidate,
    a_cpu_candidate,
    a_cpu_device,
    a_gpu_device,
    a_latent,
    a_model,
    an_architecture,
    experts,
)


def in_precision(precision: str, **changes: Any) -> ModelSpec:
    checkpoint = Checkpoint(precision=precision, source="x")
    return a_model(checkpoints=(checkpoint,), **changes)


V100, H100, L4 = a_gpu_device("V100-32"), a_gpu_device("H100-SXM"), a_gpu_device("L4")
MIXTURE = a_model(architecture=an_architecture(moe=experts()))
LATENT = a_model(architecture=an_architecture(mla=a_latent(), head_dim=192))
WHOLE_EXPERTS = {"expert_parallel": True}
THREES = a_model(architecture=an_architecture(num_heads=18, num_kv_heads=3, intermediate_size=576))
SIXES = a_model(architecture=an_architecture(num_heads=6, num_kv_heads=2, intermediate_size=576))
IN_FP8_BLOCKS = a_model(
    architecture=an_architecture(num_heads=32, intermediate_size=1536),
    checkpoints=(Checkpoint(precision="fp8", source="x", quantisation_block=128),),
)


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
        ("parameters-out-of-range", a_candidate(pipeline_parallel_size=0), "is 0"),
        ("parameters-out-of-range", a_candidate(gpu_memory_utilization=1.5), "1.5"),
        ("parameters-out-of-range", a_candidate(rank_devices=(H100, H100)), "2 devices"),
        ("engine-has-no-loader", a_candidate(engine="llamacpp"), "not bf16 safetensors"),
        (
            "engine-does-not-know-model",
            a_candidate(a_model(loaded_by=("llamacpp",))),
            "llamacpp can",
        ),
        (
            "adapters-need-gpu-for-experts",
            a_cpu_candidate(CATALOGUE.model("nano-mixtral"), lora=LoraLimits()),
            "on GPUs only",
        ),
        (
            "adapters-need-small-vocabulary",
            a_candidate(
                a_model(architecture=an_architecture(moe=experts(), vocab_size=300_000)),
                lora=LoraLimits(),
            ),
            "300,000",
        ),
        ("eplb-cannot-move-experts", a_candidate(eplb=ExpertBalance()), "nano is dense"),
        (
            "tensor-parallel-across-nodes",
            a_candidate(tensor_parallel_size=16, num_nodes=2),
            "16 would cross nodes of 8",
        ),
        (
            "ranks-not-whole-on-nodes",
            a_candidate(tensor_parallel_size=4, pipeline_parallel_size=3, num_nodes=2),
            "12 ranks in tensor-parallel groups of 4 do not lie evenly on 2 nodes",
        ),
        (
            "replica-exceeds-gpus",
            a_candidate(tensor_parallel_size=8, pipeline_parallel_size=3, num_nodes=2),
            "3 groups of 8 GPUs need 24",
        ),
        (
            "replica-exceeds-gpus",
            a_candidate(THREES, tensor_parallel_size=3, pipeline_parallel_size=3),
            "1 node has room for 2 groups",
        ),
        (
            "mixed-gpus-in-tensor-group",
            a_candidate(tensor_parallel_size=2, rank_devices=(H100, L4)),
            "H100-SXM and L4",
        ),
        (
            "cpu-and-gpu-in-replica",
            a_candidate(pipeline_parallel_size=2, rank_devices=(H100, a_cpu_device())),
            "CPUs and GPUs",
        ),
        (
            "pipeline-not-supported",
            a_candidate(a_model(supports_pipeline_parallel=False), pipeline_parallel_size=2),
            "2 pipeline stages",
        ),
        (
            "more-stages-than-layers",
            a_candidate(pipeline_parallel_size=8),
            "4 layers are too few for 8",
        ),
        (
            "layer-partition-mismatch",
            a_candidate(pipeline_parallel_size=2, layer_partition=(3, 2)),
            "3+2 does not make 4 layers",
        ),
        (
            "layer-partition-mismatch",
            a_candidate(pipeline_parallel_size=2, layer_partition=(4,)),
            "1 parts does not match 2",
        ),
        ("data-parallel-needs-experts", a_candidate(data_parallel_size=4), "4 replicas"),
        (
            "copies-in-stages-need-gpus",
            a_cpu_candidate(MIXTURE, data_parallel_size=2, pipeline_parallel_size=2),
            "2 pipeline stages each on CPUs",
        ),
        (
            "expert-parallel-needs-experts",
            a_candidate(
                MIXTURE, tensor_parallel_size=4, data_parallel_size=4, num_nodes=2, **WHOLE_EXPERTS
            ),
            "8 experts are too few for 16",
        ),
        (
            "feed-forward-not-divisible",
            a_candidate(
                a_model(architecture=an_architecture(moe=experts(expert_intermediate_size=516))),
                tensor_parallel_size=4,
                data_parallel_size=2,
            ),
            "516 cannot be split over 8",
        ),
        ("eplb-needs-expert-parallel", a_candidate(MIXTURE, enable_eplb=True), "not 1"),
        (
            "eplb-needs-expert-parallel",
            a_candidate(MIXTURE, num_redundant_experts=2),
            "2 redundant experts need enable_eplb",
        ),
        (
            "eplb-needs-even-experts",
            a_candidate(
                MIXTURE,
                tensor_parallel_size=4,
                enable_eplb=True,
                num_redundant_experts=2,
                **WHOLE_EXPERTS,
            ),
            "10 experts evenly over 4",
        ),
        (
            "context-parallel-not-divisible",
            a_candidate(tensor_parallel_size=2, decode_context_parallel_size=4),
            "4 does not divide tensor_parallel_size 2",
        ),
        (
            "context-parallel-needs-copied-heads",
            a_candidate(tensor_parallel_size=4, decode_context_parallel_size=2),
            "4 is not above 4 heads",
        ),
        (
            "context-parallel-needs-copied-heads",
            a_candidate(tensor_parallel_size=8, decode_context_parallel_size=4),
            "too few for 4",
        ),
        (
            "context-parallel-needs-copied-heads",
            a_candidate(SIXES, tensor_parallel_size=6, decode_context_parallel_size=2),
            "3 query heads per K/V head",
        ),
        (
            "context-parallel-has-no-windows",
            a_candidate(
                a_model(architecture=an_architecture(sliding_window=4096, num_kv_heads=1)),
                tensor_parallel_size=2,
                decode_context_parallel_size=2,
            ),
            "4,096 tokens",
        ),
        ("precision-needs-newer-gpu", a_candidate(in_precision("mxfp4"), device=V100), "8.0"),
        (
            "fp8-blocks-not-divisible",
            a_candidate(IN_FP8_BLOCKS, tensor_parallel_size=8),
            "intermediate_size 1536 over 8 ranks is 192: no multiple of the 128",
        ),
        (
            "marlin-tiles-not-divisible",
            a_candidate(in_precision("gptq"), tensor_parallel_size=4),
            "over 4 ranks is 64: Marlin needs",
        ),
        (
            "kv-cache-dtype-not-supported",
            a_candidate(device=V100, kv_cache_dtype="fp8"),
            "7.5, V100-32 has 7.0",
        ),
        (
            "weights-exceed-memory",
            a_candidate(
                CATALOGUE.model("mixtral"), pipeline_parallel_size=2, max_num_seqs=1024, device=L4
            ),
            "of stage 2 of 2",
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
        a_candidate(tensor_parallel_size=4, pipeline_parallel_size=4, num_nodes=2),
        a_candidate(tensor_parallel_size=8, decode_context_parallel_size=2),
        a_candidate(LATENT, tensor_parallel_size=8, decode_context_parallel_size=8),
        a_candidate(
            a_model(architecture=an_architecture(num_heads=16, num_kv_heads=16)),
            tensor_parallel_size=16,
            num_nodes=2,
            tensor_parallel_across_nodes=True,
        ),
        a_candidate(pipeline_parallel_size=2, rank_devices=(H100, L4)),
        a_candidate(pipeline_parallel_size=2, layer_partition=(3, 1)),
        a_candidate(
            a_model(architecture=an_architecture(vocab_size=32001)), tensor_parallel_size=8
        ),
        a_candidate(IN_FP8_BLOCKS, tensor_parallel_size=4),
        a_candidate(in_precision("gptq"), tensor_parallel_size=2),
        a_candidate(
            MIXTURE,
            tensor_parallel_size=4,
            enable_eplb=True,
            num_redundant_experts=4,
            **WHOLE_EXPERTS,
        ),
        a_candidate(MIXTURE, data_parallel_size=8, **WHOLE_EXPERTS),
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
    fp8, nvfp4, *_ = model.checkpoints
    common = {"tensor_parallel_size": 8, "expert_parallel": True, "device": H100}

    too_big = first_rejection(a_candidate(model, checkpoint=fp8, **common))

    assert too_big is not None
    assert too_big.rule == "weights-exceed-memory"
    assert first_rejection(a_candidate(model, checkpoint=nvfp4, **common)) is None


def test_every_rule_has_a_row_in_the_table() -> None:
    table = test_a_rule_is_broken_and_says_so_with_numbers.pytestmark[0].args[1]

    assert {row[0] for row in table} == set(RULES)


def test_large_3_in_fp8_fits_on_two_nodes_of_eight_gpus_of_80_gb_as_two_stages() -> None:
    model = CATALOGUE.model("mistral-large-3")

    candidate = a_candidate(
        model,
        checkpoint=model.checkpoints[0],
        tensor_parallel_size=8,
        pipeline_parallel_size=2,
        num_nodes=2,
        expert_parallel=True,
        max_num_seqs=128,
    )

    assert first_rejection(candidate) is None
