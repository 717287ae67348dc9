from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.candidate import GIB
from placement.catalogue import Checkpoint
from placement.memory import memory_use
from placement.parameters import count_parameters
from placement.weight_bytes import checkpoint_bytes, weights_bytes
from tests.placement.builders import (
    CATALOGUE,
    a_candidate,
    a_cpu_candidate,
    a_cpu_device,
    a_gpu_device,
    a_model,
)


def test_unquantised_weights_take_two_bytes_each_on_one_rank() -> None:
    model = CATALOGUE.model("mixtral-8x7b")

    assert weights_bytes(a_candidate(model)) == 2 * 46_702_792_704
    assert weights_bytes(a_candidate(model, dtype="float32")) == 4 * 46_702_792_704


def test_a_float32_checkpoint_is_cast_down_by_dtype_auto() -> None:
    model = a_model(checkpoints=(Checkpoint(precision="fp32", source="x"),))

    candidate = a_cpu_candidate(model)

    assert weights_bytes(candidate) == 2 * count_parameters(model.architecture).total


@pytest.mark.parametrize(
    ("precision", "published"), [("fp8", 681.5e9), ("nvfp4", 403.1e9), ("bf16", 1352e9)]
)
def test_arithmetic_reproduces_the_published_sizes_of_large_3(
    precision: str, published: float
) -> None:
    model = CATALOGUE.model("mistral-large-3")
    unread = Checkpoint(precision=precision, source="x")

    assert checkpoint_bytes(model.architecture, unread) == pytest.approx(published, rel=2e-3)


def test_large_3_in_nvfp4_takes_49_gib_on_each_of_eight_gpus() -> None:
    model = CATALOGUE.model("mistral-large-3")
    nvfp4 = next(entry for entry in model.checkpoints if entry.precision == "nvfp4")

    candidate = a_candidate(model, checkpoint=nvfp4, tensor_parallel_size=8, expert_parallel=True)

    assert 46.6 <= weights_bytes(candidate) / GIB <= 49.4


# inference-sim/inference-sim testdata: a real run with 128 request slots logged 308,016 tokens. The
# memory share is not told; 0.9 was vLLM's default then.
def test_nemo_on_an_h100_has_the_cache_of_a_real_log() -> None:
    candidate = a_candidate(
        CATALOGUE.model("mistral-nemo-12b"),
        gpu_memory_utilization=0.9,
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        max_model_len=4096,
    )

    assert memory_use(candidate).kv.tokens == pytest.approx(308_016, rel=0.015)


def test_latent_attention_keeps_16_bit_copies_on_gpus_only() -> None:
    model = CATALOGUE.model("nano-large-3")
    copies = 4 * 4 * 512 * 256 * 2

    on_gpu, on_cpu = a_candidate(model), a_cpu_candidate(model)

    assert weights_bytes(on_gpu) - weights_bytes(on_cpu) == copies


def test_on_a_cpu_the_cache_is_the_budget_and_the_process_counts() -> None:
    memory = memory_use(a_cpu_candidate()).per_gpu

    assert memory.kv_cache_bytes == GIB
    assert memory.non_torch_bytes == int(1.8 * GIB)
    assert memory.cuda_graph_bytes == 0


def test_a_cpu_slot_without_room_for_the_budget_says_how_much_is_missing() -> None:
    use = memory_use(a_cpu_candidate(device=a_cpu_device(memory_bytes=2 * GIB)))

    weights = use.per_gpu.weights_bytes
    assert use.missing_bytes == GIB + weights + int(1.8 * GIB) - 2 * GIB
    assert use.per_gpu.kv_cache_bytes == 0


@given(
    model=st.sampled_from(sorted(CATALOGUE.models)),
    gpu=st.sampled_from(sorted(CATALOGUE.gpus)),
    ranks=st.sampled_from([1, 2, 4, 8]),
    seqs=st.integers(1, 1024),
    share=st.floats(0.1, 1.0),
    length=st.integers(1, 262_144),
)
def test_memory_is_never_negative_nor_more_than_there_is(
    *, model: str, gpu: str, ranks: int, seqs: int, share: float, length: int
) -> None:
    device = a_cpu_device() if gpu == "cpu" else a_gpu_device(gpu)
    candidate = a_candidate(
        CATALOGUE.model(model),
        device=device,
        tensor_parallel_size=ranks,
        max_num_seqs=seqs,
        gpu_memory_utilization=share,
        max_model_len=length,
    )

    use = memory_use(candidate)

    memory = use.per_gpu.model_dump()
    assert min(memory.values()) >= 0
    total = memory.pop("total_bytes")
    if use.missing_bytes == 0:
        assert sum(memory.values()) == total
    assert use.kv.num_blocks * use.kv.block_size * use.kv.bytes_per_token <= total
