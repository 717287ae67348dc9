from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from placement.architecture import Architecture
from placement.capacity import Capacity, capacity
from placement.catalogue import Checkpoint, ModelSpec
from placement.fleet import Demand, Objective, TokenLengths
from placement.kernels import kernels_per_pass
from placement.performance import (
    Load,
    ReplicaSpeed,
    predict,
    prefill_s,
    replica_speed,
    step_s,
    tokens_per_step,
)
from tests.placement.builders import (
    CATALOGUE,
    a_candidate,
    a_cpu_candidate,
    a_gpu_device,
    a_model,
    an_architecture,
)

SMALL = CATALOGUE.model("mistral-small-3.2")
MIXTRAL = CATALOGUE.model("mixtral-8x7b")
ALONE = Load(concurrency=1, input_tokens=512, output_tokens=128)


def a_speed(model: ModelSpec = SMALL, gpu: str = "H100-SXM", **changes: Any) -> ReplicaSpeed:
    return replica_speed(a_candidate(model, device=a_gpu_device(gpu), **changes))


def a_demand(
    rate: float = 1.0,
    *,
    input_tokens: float = 512,
    output_tokens: float = 128,
    input_p95: float | None = None,
) -> Demand:
    return Demand(
        requests_per_s=rate,
        input_tokens=TokenLengths(mean=input_tokens, p95=input_p95),
        output_tokens=TokenLengths(mean=output_tokens),
    )


def a_capacity(**changes: Any) -> Capacity:
    fields = {
        "max_num_seqs": 256,
        "kv_cache_tokens": 170_000,
        "demand": a_demand(),
        "slo": Objective(),
    }
    return capacity(a_speed(), **{**fields, **changes})


def test_small_24b_decodes_about_52_tokens_a_second_on_an_h100() -> None:
    """France-Travail measured 51.9 for one stream."""
    prediction = predict(a_speed(), Load(concurrency=1, input_tokens=32, output_tokens=128))

    assert prediction.output_tokens_per_s == pytest.approx(51.9, rel=0.1)


def test_more_requests_make_each_slower_and_all_together_faster() -> None:
    speed = a_speed()
    predictions = [predict(speed, Load(c, 512, 128)) for c in (1, 8, 64, 256)]

    assert predictions == sorted(predictions, key=lambda prediction: prediction.tpot_ms)
    assert predictions == sorted(predictions, key=lambda each: each.output_tokens_per_s)
    assert predictions == sorted(predictions, key=lambda prediction: prediction.ttft_s)


def test_a_step_of_a_mixture_reads_the_experts_that_its_batch_chooses() -> None:
    efficiency = a_speed(MIXTRAL, "H200-SXM").efficiency
    even = replace(efficiency, routing_evenness=1.0, sequence_s=0.0)
    speed = replace(a_speed(MIXTRAL, "H200-SXM"), efficiency=even)
    bytes_per_s = 4.8e12 * efficiency.expert_bandwidth

    one = step_s(speed, concurrency=1, context=0)
    sixteen = step_s(speed, concurrency=16, context=0)

    expert_bytes = 2 * 32 * 8 * 3 * 4096 * 14336
    expected = expert_bytes * ((1 - 0.75**16) - 0.25) / bytes_per_s
    assert sixteen - one == pytest.approx(expected, rel=1e-6)


def test_tokens_choose_fewer_experts_than_at_random() -> None:
    speed = a_speed(MIXTRAL, "H200-SXM")
    even = replace(speed, efficiency=replace(speed.efficiency, routing_evenness=1.0))

    assert step_s(speed, concurrency=8, context=0) < step_s(even, concurrency=8, context=0)


def test_a_long_prompt_takes_more_than_its_share() -> None:
    speed = a_speed()

    assert prefill_s(speed, 32_000) > 2 * prefill_s(speed, 16_000)


@pytest.mark.parametrize("gpu", sorted(CATALOGUE.gpus))
def test_every_gpu_type_predicts_something_finite(gpu: str) -> None:
    candidate = a_cpu_candidate() if gpu == "cpu" else a_candidate(device=a_gpu_device(gpu))

    prediction = predict(replica_speed(candidate), ALONE)

    assert 0 < prediction.ttft_s < 10
    assert 0 < prediction.tpot_ms < 1000


def test_tensor_parallelism_helps_over_nvlink_more_than_through_host_memory() -> None:
    fast = a_speed(tensor_parallel_size=4)
    candidate = a_candidate(SMALL, device=a_gpu_device(link="pcie-no-p2p"), tensor_parallel_size=4)
    slow = replica_speed(candidate)

    one = predict(a_speed(), ALONE).tpot_ms
    assert predict(fast, ALONE).tpot_ms < predict(slow, ALONE).tpot_ms < one


def test_capacity_ends_where_the_tokens_per_second_are_promised() -> None:
    free, bound = a_capacity(), a_capacity(slo=Objective(tpot_p95_ms=25))

    assert 0 < bound.concurrency < free.concurrency
    assert bound.prediction.tpot_ms <= 25
    assert bound.broken_promise.startswith("tpot_p95_ms 25 ")


def test_capacity_ends_where_long_prompts_would_come_too_late() -> None:
    demand = a_demand(input_p95=8000)
    slo = Objective(ttft_p95_s=round(prefill_s(a_speed(), 8000) + 0.02, 3))

    bound = a_capacity(demand=demand, slo=slo)

    assert bound.broken_promise.startswith(f"ttft_p95_s {slo.ttft_p95_s:g} ")
    assert bound.requests_per_s < a_capacity(demand=demand).requests_per_s


def test_capacity_ends_where_the_cache_is_full() -> None:
    assert a_capacity(kv_cache_tokens=6400).concurrency == 10


def test_a_promise_that_one_request_breaks_leaves_no_capacity() -> None:
    none = a_capacity(slo=Objective(tpot_p95_ms=1))

    assert none.concurrency == 0
    assert none.requests_per_s == 0.0


def test_two_stages_carry_more_and_answer_one_request_no_faster() -> None:
    one, two = a_speed(), a_speed(pipeline_parallel_size=2)
    crowd = Load(concurrency=64, input_tokens=512, output_tokens=128)

    assert predict(two, crowd).output_tokens_per_s > predict(one, crowd).output_tokens_per_s
    assert predict(two, ALONE).tpot_ms >= predict(one, ALONE).tpot_ms


def test_an_uneven_split_makes_the_longest_stage_the_pace() -> None:
    crowd = Load(concurrency=64, input_tokens=512, output_tokens=128)
    even = a_speed(pipeline_parallel_size=2)
    uneven = a_speed(pipeline_parallel_size=2, layer_partition=(30, 10))

    slower = predict(uneven, crowd).tpot_ms / predict(even, crowd).tpot_ms
    assert 1.25 < slower < 1.5  # head and sampler do not grow with the layers


def test_the_stage_with_the_head_keeps_the_others_waiting() -> None:
    """TensorRT-LLM, Llama-3.3-70B: eight stages gave 4.6 times the throughput of one GPU."""
    crowd = Load(concurrency=64, input_tokens=512, output_tokens=512)
    eight = a_speed(pipeline_parallel_size=8)
    headless = replace(eight, head_bytes=0.0)

    assert predict(eight, crowd).tpot_ms > 1.1 * predict(headless, crowd).tpot_ms


def test_a_pipeline_that_is_not_full_answers_in_the_time_of_a_pass() -> None:
    four = a_speed(pipeline_parallel_size=4)

    alone, two = (step_s(four, concurrency=count, context=512) for count in (1, 2))

    assert two == pytest.approx(alone, rel=0.02)


def test_stages_on_two_nodes_pay_for_the_network() -> None:
    near = a_speed(pipeline_parallel_size=2)
    far = a_speed(pipeline_parallel_size=2, num_nodes=2)

    assert predict(far, ALONE).tpot_ms > predict(near, ALONE).tpot_ms


def test_data_parallel_copies_share_out_requests_and_read_each_expert_once() -> None:
    one = a_speed(MIXTRAL, "H200-SXM")
    four = a_speed(MIXTRAL, "H200-SXM", data_parallel_size=4, expert_parallel=True)
    crowd = Load(concurrency=64, input_tokens=512, output_tokens=128)

    assert predict(four, crowd).output_tokens_per_s > 2 * predict(one, crowd).output_tokens_per_s


def test_copies_on_two_nodes_exchange_tokens_over_the_network() -> None:
    changes = {"data_parallel_size": 8, "expert_parallel": True, "num_nodes": 2}
    slow = replica_speed(
        a_candidate(MIXTRAL, device=a_gpu_device("H200-SXM", gpus_per_node=4), **changes)
    )
    fast_network = a_gpu_device("H200-SXM", gpus_per_node=4, inter_node_bytes_per_s=400e9)
    fast = replica_speed(a_candidate(MIXTRAL, device=fast_network, **changes))
    crowd = Load(concurrency=256, input_tokens=512, output_tokens=128)

    assert predict(slow, crowd).tpot_ms > predict(fast, crowd).tpot_ms


def test_requests_without_room_wait_for_others_to_end() -> None:
    speed = a_speed(max_num_seqs=32)

    full, crowded = (predict(speed, Load(c, 512, 128)) for c in (32, 64))

    assert crowded.tpot_ms == full.tpot_ms
    assert crowded.output_tokens_per_s == pytest.approx(full.output_tokens_per_s)
    assert crowded.ttft_s == pytest.approx(
        full.ttft_s + full.ttft_s + 127 * full.tpot_ms / 1000, rel=1e-6
    )


def test_weights_that_are_unpacked_gain_no_flops() -> None:
    def prefill(gpu: str) -> float:
        fp8 = Checkpoint(precision="fp8", source="x")
        return prefill_s(a_speed(gpu=gpu, checkpoint=fp8), 8000) / prefill_s(a_speed(gpu=gpu), 8000)

    assert prefill("A100-80-SXM") == pytest.approx(1.0, abs=0.02)
    assert prefill("H100-SXM") < 0.7


def test_windows_shorten_what_most_layers_look_at() -> None:
    windows = an_architecture(sliding_window=1024, full_attention_layers=1)
    all_full, mixed = a_speed(a_model()), a_speed(a_model(architecture=windows))

    def attention(speed: ReplicaSpeed) -> float:
        return step_s(speed, concurrency=64, context=30_000) - step_s(
            speed, concurrency=64, context=0
        )

    assert attention(mixed) < attention(all_full)


def test_copies_have_slots_each() -> None:
    speed = a_speed(MIXTRAL, "H200-SXM", data_parallel_size=2, expert_parallel=True)
    common = {"max_num_seqs": 8, "kv_cache_tokens": 10**7, "demand": None, "slo": Objective()}

    assert capacity(speed, **common).concurrency == 16


def test_the_draft_of_large_3_pays_when_its_tokens_are_accepted() -> None:
    fp8 = Checkpoint(precision="fp8", source="x")
    speed = a_speed(
        CATALOGUE.model("mistral-large-3-675b-2512"),
        "H200-SXM",
        checkpoint=fp8,
        tensor_parallel_size=8,
    )
    plain = predict(speed, Load(4, 512, 128))

    def drafted(rate: float) -> float:
        return predict(speed, Load(4, 512, 128, acceptance_rate=rate)).tpot_ms

    assert drafted(0.8) < 0.8 * plain.tpot_ms
    assert drafted(0.0) > 1.1 * plain.tpot_ms
    assert sorted(map(drafted, (0.0, 0.3, 0.6, 0.9)), reverse=True) == [
        drafted(rate) for rate in (0.0, 0.3, 0.6, 0.9)
    ]


def test_a_step_verifies_as_many_tokens_as_are_expected_to_be_accepted() -> None:
    """Leviathan et al., equation 1."""
    assert tokens_per_step(0.7, 3) == pytest.approx((1 - 0.7**4) / (1 - 0.7))
    assert tokens_per_step(1.0, 3) == 4
    assert tokens_per_step(0.0, 3) == 1


def test_cached_prompts_are_neither_computed_nor_in_the_way() -> None:
    speed = a_speed()
    none, most = (predict(speed, Load(32, 4000, 128, prefix_hit=hit)) for hit in (0.0, 0.9))

    assert most.ttft_s < 0.4 * none.ttft_s
    assert most.tpot_ms < none.tpot_ms
    assert predict(speed, Load(32, 4000, 128, prefix_hit=1.0)).ttft_s > 0


def test_a_prediction_tells_by_how_much_such_predictions_were_off() -> None:
    hopper, ampere = (predict(a_speed(gpu=gpu), ALONE) for gpu in ("H200-SXM", "A100-80-SXM"))

    assert 0 < (hopper.tpot_error or 0) < (ampere.tpot_error or 0) < 0.5
    assert 0 < (hopper.ttft_error or 0) < (ampere.ttft_error or 0) < 0.5


def test_a_message_that_is_too_large_to_be_sent_at_once_costs_a_second_exchange() -> None:
    """vLLM's custom all-reduce: one shot below 512 KiB on four ranks, 256 KiB on eight."""
    four, eight = (a_speed(tensor_parallel_size=ranks).all_reduce for ranks in (4, 8))
    two = a_speed(tensor_parallel_size=2).all_reduce

    for collective, limit in ((four, 512 * 1024), (eight, 256 * 1024)):
        jump = collective.seconds(limit) - collective.seconds(limit - 1)
        assert jump == pytest.approx(collective.two_shot_s, rel=0.01)
        assert jump > 1e-6
    assert two.two_shot_bytes is None


def test_whole_experts_on_ranks_wait_for_the_fullest_rank() -> None:
    together, spread = (
        a_speed(MIXTRAL, "H200-SXM", tensor_parallel_size=4, expert_parallel=parallel)
        for parallel in (False, True)
    )

    assert step_s(spread, concurrency=2, context=0) > step_s(together, concurrency=2, context=0)


@pytest.mark.parametrize(
    ("architecture", "quantised", "kernels"),
    [
        (an_architecture(num_layers=10), False, 110),
        (an_architecture(num_layers=10), True, 140),
        (an_architecture(num_layers=10, qk_norm=True), False, 130),
        (MIXTRAL.architecture, False, 32 * 15),
    ],
)
def test_kernels_are_counted(architecture: Architecture, quantised: bool, kernels: int) -> None:
    assert kernels_per_pass(architecture, quantised_activations=quantised) == kernels
