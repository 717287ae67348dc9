from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.architecture import Architecture
from placement.catalogue import Checkpoint
from placement.errors import ConfigError, UnknownName
from placement.fit import fit
from placement.fit_answer import FitAnswer, FitShape
from placement.fit_checkpoints import Subject
from placement.fit_claims import claims
from placement.fit_ranking import rank_gpus
from placement.fit_request import FitRequest, make_request
from placement.gguf_weights import weights_from_header
from placement.headers.gguf import read_gguf
from placement.headers.model_files import gguf_model
from placement.hf_config import model_from_config
from tests.placement.builders import CATALOGUE, a_model, an_architecture, experts
from tests.placement.header_files import a_mistral_gguf, in_memory
from tests.placement.test_hf_config import DEEPSEEK_V3, MISTRAL, MISTRAL3, MIXTRAL, QWEN3_MOE

LARGE_3, SMALL = "mistral-large-3-675b-2512", "mistral-small-3.2-24b-2506"
GIB = 2**30


def ask(model: str, gpu: str, **options: Any) -> FitAnswer:
    return fit(Subject(CATALOGUE.model(model)), make_request(gpu, **options), CATALOGUE)


def best_of(answer: FitAnswer) -> FitShape:
    assert answer.best is not None
    return answer.best


@pytest.mark.parametrize(
    ("model", "gpu", "options", "verdict"),
    [
        (LARGE_3, "H100-SXM:8", {"precision": "fp8"}, "does_not_fit"),
        (LARGE_3, "H200-SXM:8", {"precision": "fp8"}, "fits"),
        (LARGE_3, "B200:8", {"precision": "fp8"}, "fits"),
        (LARGE_3, "H100-SXM:8", {"precision": "fp8", "num_nodes": 2}, "fits"),
        (LARGE_3, "H100-SXM:8", {"precision": "nvfp4"}, "fits"),
        (LARGE_3, "A100-80-SXM:8", {"precision": "nvfp4"}, "fits"),
        (LARGE_3, "RTX-4090:4", {"precision": "q4_k_m", "host_memory_gib": 512}, "offload"),
        (LARGE_3, "RTX-4090:4", {"precision": "q4_k_m", "host_memory_gib": 128}, "does_not_fit"),
        ("mixtral-8x7b", "L40S:2", {"precision": "bf16"}, "does_not_fit"),
        ("mixtral-8x7b", "A100-80-SXM:2", {"precision": "bf16"}, "fits"),
        ("mixtral-8x7b", "A100-40-SXM:2", {"precision": "bf16"}, "does_not_fit"),
        (SMALL, "4090", {"precision": "q4_k_m"}, "fits"),
        (SMALL, "4090", {"precision": "bf16"}, "does_not_fit"),
        (SMALL, "A100-80-SXM", {"precision": "bf16"}, "fits"),
        (SMALL, "4090:4", {"precision": "bf16"}, "fits"),
        ("mistral-7b-v0.1", "l4", {"precision": "bf16"}, "fits"),
        ("mistral-nemo-12b", "a10", {"precision": "bf16", "engine": "vllm"}, "does_not_fit"),
    ],
)
def test_well_known_questions_have_well_known_answers(
    model: str, gpu: str, options: dict[str, Any], verdict: str
):
    assert ask(model, gpu, **options).verdict == verdict


def test_fp8_on_eight_h100s_fails_by_the_weights():
    answer = ask(LARGE_3, "H100-SXM:8", precision="fp8")

    assert answer.best is None
    assert answer.checkpoint_bytes == pytest.approx(681e9, rel=0.01)
    assert "fp8 weights take 68" in answer.summary
    assert {entry.rule for entry in answer.rejected} == {"weights-exceed-memory"}
    assert any(advice.startswith("--precision nvfp4: fits") for advice in answer.advice)
    assert any("--nodes 2: fits as vllm fp8 on 16 GPUs" in advice for advice in answer.advice)


def test_nvfp4_on_eight_a100s_holds_one_long_request():
    best = best_of(ask(LARGE_3, "A100-80-SXM:8", precision="nvfp4"))

    assert best.tensor_parallel_size == 8
    assert 255_000 <= best.kv_cache_tokens <= 362_000
    assert 1.0 <= best.max_concurrency < 1.5
    assert best.kv_bytes_per_token == 70_272  # the latent of 61 layers, on every rank
    assert any("weight-only" in note for note in best.notes)


def test_small_in_q4_on_a_4090_runs_wholly_on_the_gpu():
    best = best_of(ask(SMALL, "4090", precision="q4_k_m"))

    assert best.engine == "llamacpp"
    assert best.gpu_layers == best.num_layers == 40
    assert best.max_model_len > 32_768
    assert "--n-gpu-layers" in best.engine_args
    assert best.engine_args[best.engine_args.index("--n-gpu-layers") + 1] == "41"


def test_paging_from_disk_is_named():
    answer = ask(LARGE_3, "RTX-4090:4", precision="q4_k_m", host_memory_gib=128)

    assert {entry.rule for entry in answer.rejected} == {"pages-from-disk"}
    assert "paged from disk" in answer.summary
    assert "4 x RTX-4090" in answer.summary


def test_offload_says_how_much_host_memory_it_needs():
    best = best_of(ask(LARGE_3, "RTX-4090:4", precision="q4_k_m"))

    assert best.verdict == "offload"
    assert 250 * GIB < best.host_memory_bytes < 420 * GIB
    assert 0 < best.cpu_moe_layers <= 61
    assert "--n-cpu-moe" in best.engine_args
    assert best.prediction.tpot_ms > 50


def test_an_engine_without_a_loader_is_a_reason():
    answer = ask(SMALL, "4090", precision="q4_k_m", engine="vllm")

    assert answer.verdict == "does_not_fit"
    assert [entry.rule for entry in answer.rejected] == ["engine-has-no-loader"]
    assert any("--precision" in advice or "llamacpp" in advice for advice in answer.advice)


def test_a_precision_that_cannot_be_made_is_a_reason():
    answer = ask(LARGE_3, "H200-SXM:8", precision="awq")

    assert answer.verdict == "does_not_fit"
    assert [entry.rule for entry in answer.rejected] == ["no-such-checkpoint"]
    assert "only" in answer.summary


def test_fp8_is_made_from_16_bits_while_loading():
    model = a_model(architecture=an_architecture(hidden_size=1024, intermediate_size=4096))
    answer = fit(Subject(model), make_request("H100-SXM", precision="fp8"), CATALOGUE)

    best = best_of(answer)
    assert best.precision == "fp8"
    assert best.engine_args[-2:] != ("--dtype", "auto")
    at = best.engine_args.index("--quantization")
    assert best.engine_args[at + 1] == "fp8"
    assert best.sizes_from == "arithmetic"


def test_the_context_is_cut_down_only_when_it_is_left_open():
    open_ended = best_of(ask(SMALL, "A100-80-SXM", precision="bf16", max_num_seqs=16))
    assert open_ended.max_model_len <= 131_072

    asked = ask(SMALL, "L40S", precision="fp8", max_model_len=131_072)
    assert all(shape.max_model_len == 131_072 for shape in asked.shapes)


def test_a_context_that_is_too_long_for_the_gpu_has_a_way_out():
    answer = ask(
        "ministral-3-8b-2512", "4090", engine="vllm", precision="fp8", max_model_len=262_144
    )

    assert answer.verdict == "does_not_fit"
    assert any(advice.startswith("--max-model-len") for advice in answer.advice)


def test_advice_is_true():
    """What is told to be changed is changed, and the answer asked for again."""
    answer = ask("mixtral-8x7b", "L40S:2", precision="bf16")
    for advice in answer.advice:
        option, _, result = advice.partition(": ")
        words = option.split(" (")[0].split()
        changes = dict(zip(words[::2], words[1::2], strict=True))
        gpu = changes.pop("--gpu", "L40S:2")
        options = {"precision": "bf16"}
        options |= {key[2:].replace("-", "_"): value for key, value in changes.items()}
        again = ask("mixtral-8x7b", gpu, **options)
        assert again.verdict == result.split()[0], advice
    assert len(answer.advice) >= 2


def test_a_tight_fit_is_said_to_be_one():
    """Memory is taken away until the model's own error is larger than what is left over."""
    verdicts = []
    for share in range(96, 40, -1):
        answer = ask(
            SMALL, "A100-80-SXM", precision="bf16", engine="vllm", max_model_len=2048,
            max_num_seqs=16, max_num_batched_tokens=1024, gpu_memory_utilization=share / 100,
        )  # fmt: skip
        verdicts.append(answer.verdict)
    assert sorted(set(verdicts), key=verdicts.index) == ["fits", "tight", "does_not_fit"]


def test_shapes_are_ordered_and_best_is_the_first():
    answer = ask(LARGE_3, "H200-SXM:8")

    order = ["fits", "tight", "offload"]
    ranks = [order.index(shape.verdict) for shape in answer.shapes]
    assert answer.best == answer.shapes[0]
    assert ranks == sorted(ranks)
    assert best_of(answer).precision == "fp8"  # 8 bits before 4


def test_fewer_gpus_are_better_and_the_others_hold_replicas():
    best = best_of(ask("mistral-7b-v0.1", "H100-SXM:8", precision="bf16"))

    assert best.gpus_per_replica == 1
    assert best.replicas == 8


def test_load_is_what_the_prediction_is_for():
    alone = best_of(ask(SMALL, "H100-SXM", precision="bf16", concurrency=1))
    together = best_of(ask(SMALL, "H100-SXM", precision="bf16", concurrency=64))

    assert together.prediction.output_tokens_per_s > 5 * alone.prediction.output_tokens_per_s
    assert together.prediction.tpot_ms > alone.prediction.tpot_ms


def test_across_nodes_stages_are_preferred_to_data_parallelism():
    best = best_of(ask(LARGE_3, "H100-SXM:8", precision="fp8", num_nodes=2))

    assert (best.tensor_parallel_size, best.pipeline_parallel_size) == (8, 2)
    assert best.num_nodes == 2


def test_copies_have_slots_each():
    asked = {"precision": "fp8", "num_nodes": 2, "data_parallel_size": 2, "max_model_len": 65536}
    best = best_of(ask(LARGE_3, "H100-SXM:8", **asked))

    assert (best.tensor_parallel_size, best.data_parallel_size) == (8, 2)
    assert f"up to {2 * best.max_num_seqs} shorter ones" in best.limit


@pytest.mark.parametrize(
    ("gpu", "options", "message"),
    [
        ("H100-SXM:x", {}, "TYPE:COUNT is expected"),
        ("H100-SXM:", {}, "TYPE:COUNT is expected"),
        ("H100-SXM:0", {}, "--num-gpus"),
        ("H100-SXM:4", {"tensor_parallel_size": 8}, "multiply to 8 GPUs"),
        (
            "H100-SXM:8",
            {"tensor_parallel_size": 4, "pipeline_parallel_size": 4},
            "multiply to 16 GPUs",
        ),
        ("H100-SXM", {"engine": "tgi"}, "--engine"),
        ("H100-SXM", {"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization"),
        ("H100-SXM", {"max_model_len": 100, "input_tokens": 200}, "longer than --max-model-len"),
        ("cpu", {}, "needs --host-memory-gib"),
    ],
)
def test_options_that_cannot_be_are_refused(gpu: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make_request(gpu, **options)


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(UnknownName, match="H100-SXM"):
        ask(SMALL, "H100-SXN")
    with pytest.raises(UnknownName, match="q4_k_m"):
        make_request("H100-SXM", precision="q4_km")
    with pytest.raises(UnknownName, match="KV-cache type"):
        make_request("H100-SXM", kv_cache_dtype="int3")


@pytest.mark.parametrize(
    ("given", "meant"), [("BF16", "bf16"), ("float16", "fp16"), ("Q4_K_M", "q4_k_m"), ("int4", "gptq")]
)  # fmt: skip
def test_precisions_have_other_names(given: str, meant: str):
    assert make_request("H100-SXM", precision=given).precision == meant


def test_the_answer_has_the_form_of_the_contract():
    answer = json.loads(ask(LARGE_3, "H100-SXM:8").model_dump_json())

    assert {
        "model", "gpu", "num_gpus", "num_nodes", "parameters", "active_parameters",
        "checkpoint_bytes", "verdict", "best", "shapes", "rejected", "advice", "sizes_from",
    } <= set(answer)  # fmt: skip
    assert {
        "engine", "precision", "tensor_parallel_size", "pipeline_parallel_size",
        "data_parallel_size", "expert_parallel", "max_model_len", "max_num_seqs",
        "max_num_batched_tokens", "gpu_memory_utilization", "kv_cache_dtype", "per_gpu",
        "kv_bytes_per_token", "kv_cache_tokens", "max_concurrency", "gpu_layers", "num_layers",
        "host_memory_bytes", "prediction", "engine_args",
    } <= set(answer["best"])  # fmt: skip
    assert set(answer["best"]["per_gpu"]) == {
        "total_bytes", "weights_bytes", "adapter_bytes", "activation_bytes", "non_torch_bytes", "cuda_graph_bytes",
        "kv_cache_bytes", "headroom_bytes",
    }  # fmt: skip
    assert set(answer["best"]["prediction"]) == {
        "ttft_s", "tpot_ms", "output_tokens_per_s", "ttft_error", "tpot_error",
    }  # fmt: skip
    assert all({"shape", "rule", "reason"} <= set(entry) for entry in answer["rejected"])
    assert answer["best"]["engine_args"][0] == "--model"


def test_sizes_come_from_the_header_where_there_is_one():
    header = read_gguf(in_memory(a_mistral_gguf(), "m.gguf"))
    model = gguf_model("m", "m.gguf", header)
    weights = weights_from_header(header, model.architecture)

    answer = fit(Subject(model, weights, from_headers=True), make_request("4090"), CATALOGUE)

    assert answer.sizes_from == "header"
    assert answer.checkpoint_bytes == sum(tensor.num_bytes for tensor in header.tensors)
    assert best_of(answer).per_gpu.weights_bytes == answer.checkpoint_bytes - weights.embedding


def test_a_cpu_runs_what_its_memory_holds():
    assert ask("mistral-7b-v0.3", "cpu", host_memory_gib=64).verdict == "fits"
    assert ask(LARGE_3, "cpu", host_memory_gib=64).verdict == "does_not_fit"


def test_ranking_puts_the_cheapest_that_fits_first():
    ranking = rank_gpus(Subject(CATALOGUE.model(SMALL)), CATALOGUE).ranking

    fitting = [entry.price_per_hour for entry in ranking if entry.verdict == "fits"]
    priced = [price for price in fitting if price is not None]
    assert priced == sorted(priced)
    assert fitting[: len(priced)] == priced
    assert len(ranking) == 4 * (len(CATALOGUE.gpus) - 1)
    assert all(entry.best is None for entry in ranking if entry.verdict == "does_not_fit")


def test_claims_are_answered_by_our_own_numbers():
    found = {claim.says: claim for claim in claims(CATALOGUE)}

    assert len(found) >= 11
    large_on_4090 = next(claim for says, claim in found.items() if "4 x RTX 4090" in says)
    assert not large_on_4090.holds
    assert "paged from disk" in large_on_4090.truth
    disk = next(claim for says, claim in found.items() if says.startswith("disk"))
    assert "nvfp4 403 GB" in disk.truth
    window = next(claim for says, claim in found.items() if "sliding window" in says)
    assert "no window" in window.truth
    a100 = next(claim for says, claim in found.items() if "NVFP4 checkpoint" in says)
    assert "weight-only" in a100.truth


def test_the_seeds_calculator_is_reproduced_and_corrected():
    """Prositronic's page for FP32 on an L40S: nominal GB as GiB, no head, no embedding."""
    size, video_memory, layers = 87.82, 48.0, 40
    per_layer = size / layers
    on_gpu = int((video_memory - 1.845) / per_layer)
    kv_gib = 512 * 2 * 40 * 8 * 128 * 2 / GIB
    used = on_gpu * per_layer + 1.25 * kv_gib + 1.27

    assert on_gpu == 21
    assert round(used, 1) == 47.5
    assert round(size * (1 - on_gpu / layers), 1) == 41.7

    options = {"precision": "fp32", "engine": "llamacpp", "max_model_len": 512}
    ours = best_of(ask("mistral-small-3-24b-2501", "L40S", **options))
    assert ours.gpu_layers is not None
    assert 18 <= ours.gpu_layers <= 20
    assert ours.per_gpu.total_bytes < 45 * GIB


ARCHITECTURES = st.builds(
    an_architecture,
    hidden_size=st.sampled_from([64, 256, 4096, 7168]),
    num_layers=st.integers(1, 90),
    num_heads=st.sampled_from([1, 8, 12, 32, 128]),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([16, 64, 128]),
    intermediate_size=st.sampled_from([128, 14336, 13000]),
    vocab_size=st.integers(1, 200_000),
    sliding_window=st.sampled_from([None, 512, 4096]),
    max_position=st.integers(1, 300_000),
    tied_embeddings=st.booleans(),
    moe=st.sampled_from([None, experts(), experts(num_experts=128, num_shared_experts=1)]),
)


@settings(max_examples=60, deadline=None)
@given(
    architecture=ARCHITECTURES,
    gpu=st.sampled_from(["l4", "4090", "A100-80-SXM", "B200", "V100-32"]),
    num_gpus=st.sampled_from([1, 2, 3, 8]),
    num_nodes=st.sampled_from([1, 2]),
    precision=st.sampled_from([None, "bf16", "fp8", "q4_k_m", "fp32"]),
    max_model_len=st.sampled_from([None, 1, 4096, 200_000]),
    max_num_seqs=st.sampled_from([None, 1, 2048]),
    host_memory_gib=st.sampled_from([None, 8.0, 512.0]),
)
def test_no_answer_is_negative_or_larger_than_the_gpu(architecture: Architecture, **options: Any):
    gpu = options.pop("gpu")
    model = a_model(architecture=architecture, context=architecture.max_position)
    gguf = Checkpoint(precision="q4_k_m", format="gguf", source="m.gguf")
    model = model.model_copy(update={"checkpoints": (*model.checkpoints, gguf)})
    request = FitRequest(gpu=gpu, **options)

    answer = fit(Subject(model), request, CATALOGUE)

    assert (answer.best is None) == (answer.verdict == "does_not_fit")
    memory = CATALOGUE.gpu(gpu).memory_bytes or 0
    for shape in answer.shapes:
        for each in (*shape.gpus, shape.per_gpu):
            parts = each.model_dump()
            total = parts.pop("total_bytes")
            assert min(parts.values()) >= 0
            assert sum(parts.values()) <= total <= memory
        assert shape.kv_cache_tokens * shape.kv_bytes_per_token >= 0
        assert shape.max_model_len >= 1
        assert shape.gpus_per_replica <= request.total_gpus
        assert shape.host_memory_bytes >= 0
        assert shape.prediction.tpot_ms > 0


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**7), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=2), st.just({}), st.just({"quant_method": []}),
    st.just({"quant_method": "compressed-tensors", "config_groups": 3}), st.just([None]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_configurations_end_in_an_answer_or_a_config_error(data: st.DataObject):
    known = [MISTRAL, MIXTRAL, QWEN3_MOE, DEEPSEEK_V3, MISTRAL3]
    config: dict[str, Any] = dict(data.draw(st.sampled_from(known)))
    keys = sorted({*config, "quantization_config", "layer_types", "head_dim", "dtype"})
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=3)):
        if data.draw(st.booleans()):
            config.pop(key, None)
        else:
            config[key] = data.draw(JUNK)
    try:
        model = model_from_config("m", config, "m")
        answer = fit(Subject(model), make_request("H100-SXM:2"), CATALOGUE)
    except ConfigError:
        return
    assert answer.parameters > 0
