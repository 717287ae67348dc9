import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.adapter import EngineFacts, EngineLoad, Launch, num_ports
from cluster.engines.vllm import GIB, VllmEngine
from tests.builders import a_shape, a_variant

ENGINE = VllmEngine(cache=Path("/cache"))
PLANNED = ("--model", "nano:nano-mixtral", "--tensor-parallel-size", "1", "--dtype", "bfloat16")

CPU_LOG = """\
(APIServer pid=5379) INFO 11-22 09:17:45 [api_utils.py:286] non-default args: {'port': 18901}
(APIServer pid=5379) INFO 11-22 09:17:56 [model.py:733] Resolved architecture: MixtralForCausalLM
(APIServer pid=5379) WARNING 11-22 09:17:56 [vllm.py:1703] Enforce eager set, disabling torch.compile
(Worker pid=5423) INFO 11-22 09:18:11 [cpu_model_runner.py:68] Starting to load model /cache/n...
Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00, 26.40it/s]
(Worker pid=5423) INFO 11-22 09:18:12 [default_loader.py:501] Loading weights took 0.04 seconds
(EngineCore pid=5414) INFO 11-22 09:18:13 [kv_cache_utils.py:2327] CPU KV cache size: \
524,288 tokens, Maximum concurrency for 4,096 tokens per request: 128.00x
(EngineCore pid=5414) INFO 11-22 09:18:14 [core.py:402] init engine (profile, create kv cache, \
warmup model) took 1.04 s
(APIServer pid=5379) INFO 11-22 09:18:15 [launcher.py:195] Route: /health, Methods: GET
"""
GPU_LOG = """\
(EngineCore pid=7) INFO 11-22 09:18:11 [gpu_model_runner.py:5150] Model loading took 13.51 GiB \
memory and 4.220000 seconds
(EngineCore pid=7) INFO 11-22 09:18:13 [kv_cache_utils.py:2327] GPU KV cache size: \
452,016 tokens, Maximum concurrency for 32,768 tokens per request: 13.79x
"""
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="chat"} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="chat"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="chat",reason="capacity"} 2.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="chat"} 0.25
"""


def launch(
    *,
    checkpoint: Path | str = Path("/cache/nano"),
    gpu: str = "cpu",
    kv_cache_bytes: int = GIB,
    **shape: Any,
) -> Launch:
    planned = a_shape(engine="vllm", **{"engine_args": PLANNED, **shape})
    memory = planned.per_gpu.model_copy(update={"kv_cache_bytes": kv_cache_bytes})
    variant = a_variant(gpu=gpu, shape=planned.model_copy(update={"per_gpu": memory}))
    return ENGINE.launch(
        variant, checkpoint=checkpoint, host="127.0.0.1", port=4000, api_key="secret"
    )


def test_command_on_a_cpu() -> None:
    assert launch().command == (
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", "/cache/nano", "--enforce-eager"),
        *("--tensor-parallel-size", "1", "--dtype", "bfloat16"),
        *("--served-model-name", "chat", "--host", "127.0.0.1", "--port", "4000"),
        "--disable-uvicorn-access-log",
    )


def test_graphs_are_used_on_gpus_and_by_pipelines() -> None:
    assert "--enforce-eager" not in launch(gpu="H100-SXM").command
    assert "--enforce-eager" not in launch(pipeline_parallel_size=2).command


def test_key_is_in_the_environment_where_process_lists_do_not_show_it() -> None:
    started = launch()

    assert started.env["VLLM_API_KEY"] == "secret"
    assert "secret" not in started.command


def test_environment_on_a_cpu() -> None:
    assert launch().env == {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_API_KEY": "secret",
        "VLLM_CACHE_ROOT": "/cache/vllm",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_DISABLE_LOG_LOGO": "1",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
        "VLLM_NO_USAGE_STATS": "1",
    }


def test_environment_on_gpus_holds_nothing_for_cpus() -> None:
    assert not [name for name in launch(gpu="H100-SXM").env if "CPU" in name or "OMP" in name]


def test_several_ranks_have_a_process_each() -> None:
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in launch(tensor_parallel_size=2).env


def test_variable_for_whole_gib_leaves_other_sizes_to_the_flag() -> None:
    assert "VLLM_CPU_KVCACHE_SPACE" not in launch(kv_cache_bytes=GIB // 2).env


def test_only_local_checkpoints_are_loaded_offline() -> None:
    repo = launch(checkpoint="mistralai/Mistral-7B-v0.1")

    assert "HF_HUB_OFFLINE" not in repo.env
    assert repo.command[3:5] == ("--model", "mistralai/Mistral-7B-v0.1")


def test_an_engine_that_has_a_draft_to_download_is_not_offline() -> None:
    drafted = launch(engine_args=("--speculative-config", '{"model": "someone/Draft"}'))

    assert "HF_HUB_OFFLINE" not in drafted.env


def test_stages_of_a_start_in_their_order() -> None:
    stages = [ENGINE.stage(line) for line in CPU_LOG.splitlines()]

    assert stages == [
        "reading the configuration",
        "starting workers",
        None,
        "loading weights",
        "loading weights, 50 %",
        "preparing weights",
        "allocating the KV cache",
        "starting the HTTP server",
        None,
    ]


def test_stages_on_gpus() -> None:
    lines = [
        "[backends.py:1105] Using cache directory: /cache/vllm for vLLM's torch.compile",
        "[backends.py:1167] Dynamo bytecode transform time: 6.21 s",
        "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  40%|####      | 20/51",
    ]

    assert list(map(ENGINE.stage, lines)) == ["compiling", "compiling", "capturing CUDA graphs"]


@pytest.mark.parametrize(
    ("log", "facts"),
    [
        (CPU_LOG, EngineFacts(kv_cache_tokens=524_288)),
        (GPU_LOG, EngineFacts(kv_cache_tokens=452_016, weights_bytes=14_506_252_042)),
        ("", EngineFacts()),
    ],
)
def test_facts_in_the_log(log: str, facts: EngineFacts) -> None:
    assert ENGINE.facts(log) == facts


def test_load_from_metrics() -> None:
    assert ENGINE.load(METRICS) == EngineLoad(running=3, waiting=2, kv_cache_usage=0.25)


def test_load_of_data_parallel_ranks_is_summed_and_their_cache_usage_averaged() -> None:
    second = METRICS.replace('engine="0"', 'engine="1"').replace(" 0.25", " 0.75")

    assert ENGINE.load(METRICS + second) == EngineLoad(running=6, waiting=4, kv_cache_usage=0.5)


def test_engine_without_metrics_has_no_load() -> None:
    assert ENGINE.load("") == EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)


def test_adapters_may_be_loaded_while_it_runs_where_there_is_room_for_them() -> None:
    flags = (*PLANNED, "--enable-lora", "--max-loras", "4", "--max-lora-rank", "16")

    assert launch(engine_args=flags).env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in launch().env


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_that_hands_caches_on_is_told_where_others_meet_it(role: str) -> None:
    variant = a_variant(role=role, shape=a_shape(engine="vllm", data_parallel_size=2))

    planned = ENGINE.launch(variant, checkpoint="x", host="10.0.0.7", port=4000, api_key="k")

    assert num_ports(variant) == 3  # the server's, and one for each data-parallel rank
    assert planned.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.7"
    assert planned.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "4001"


def test_an_engine_that_does_all_the_work_has_no_side_channel() -> None:
    assert not [name for name in launch().env if "SIDE_CHANNEL" in name]
    assert num_ports(a_variant()) == 1
