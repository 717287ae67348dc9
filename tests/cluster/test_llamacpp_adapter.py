import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.adapter import EngineFacts, EngineLoad, Launch
from cluster.engines.llamacpp import LlamacppEngine
from cluster.engines.llamacpp_server import common_params, main, parser
from tests.builders import a_shape, a_variant

ENGINE = LlamacppEngine()
PLANNED = ("--hf-repo", "someone/Model-GGUF:Q4_K_M", "--ctx-size", "8192", "--parallel", "4")

CPU_LOG = """\
0.00.003.162 I srv    load_model: loading model '/models/tiny.gguf'
0.00.004.918 I load_tensors:   CPU_Mapped model buffer size =     8.51 MiB
0.00.004.920 I load_tensors:   CPU_REPACK model buffer size =     2.00 MiB
0.00.005.070 I llama_context: constructing llama_context
0.00.006.060 I llama_kv_cache: size =    4.00 MiB (  2048 cells,   4 layers,  4/1 seqs), K (f16):
0.00.006.071 I sched_reserve: reserving ...
0.00.045.330 I cmn  common_init_: warming up the model with an empty run - please wait ...
0.00.009.528 I srv          init: listening on http://127.0.0.1:18556
"""
GPU_LOG = """\
0.01.004.918 I load_tensors:        CUDA0 model buffer size =  9000.50 MiB
0.01.004.918 I load_tensors:        CUDA1 model buffer size =  9100.25 MiB
0.01.004.918 I load_tensors:   CPU_Mapped model buffer size = 20000.00 MiB
0.01.004.918 I load_tensors:    CUDA_Host model buffer size =   500.00 MiB
"""
METRICS = """\
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 3
"""
SLOTS = """[{"id":0,"is_processing":true,"n_prompt_tokens":100},{"id":1,"is_processing":false},
{"id":2,"is_processing":true,"n_prompt_tokens":28},{"id":3,"is_processing":true}]"""


def launch(
    *, checkpoint: Path | str = Path("/models/tiny.gguf"), gpu: str = "cpu", **shape: Any
) -> Launch:
    defaults = {"engine": "llamacpp", "precision": "q4_k_m", "engine_args": PLANNED}
    planned = a_shape(**{**defaults, "host_memory_bytes": 5, **shape})
    variant = a_variant(gpu=gpu, shape=planned, gpus_per_replica=2)
    return ENGINE.launch(
        variant, checkpoint=checkpoint, host="127.0.0.1", port=4000, api_key="secret"
    )


def test_command_on_a_cpu() -> None:
    assert launch().command == (
        *(sys.executable, "-m", "cluster.engines.llamacpp_server"),
        *("--model", "/models/tiny.gguf"),
        *("--kv-unified-per-slot", "4096", "--cache-ram", "0", "--threads", "2"),
        *("--ctx-size", "8192", "--parallel", "4"),
        *("--alias", "chat", "--host", "127.0.0.1", "--port", "4000"),
        *("--host-memory-bytes", "5"),
    )


def test_threads_are_llama_cpps_own_choice_beside_gpus() -> None:
    assert "--threads" not in launch(gpu="RTX-4090").command


def test_a_file_that_is_not_there_is_left_to_the_server_to_refuse() -> None:
    assert launch(checkpoint="/gone/x.gguf").command[3:5] == ("--model", "/gone/x.gguf")


def test_key_is_in_the_environment_where_process_lists_do_not_show_it() -> None:
    started = launch()

    assert started.env == {"LLAMA_API_KEY": "secret"}
    assert "secret" not in started.command


def test_stages_of_a_start_in_their_order() -> None:
    assert [ENGINE.stage(line) for line in CPU_LOG.splitlines()] == [
        "loading weights",
        None,
        None,
        "allocating the KV cache",
        None,
        "reserving buffers",
        "warming up",
        "starting the HTTP server",
    ]


@pytest.mark.parametrize(
    ("log", "facts"),
    [
        (CPU_LOG, EngineFacts(kv_cache_tokens=2048, weights_bytes=11_020_534)),
        (GPU_LOG, EngineFacts(weights_bytes=9_542_303_744)),
        ("", EngineFacts()),
    ],
)
def test_facts_in_the_log(log: str, facts: EngineFacts) -> None:
    assert ENGINE.facts(log) == facts


def test_load_of_both_pages() -> None:
    assert ENGINE.load_paths == ("/metrics", "/slots")
    assert ENGINE.load(METRICS, SLOTS) == EngineLoad(
        running=2, waiting=3, kv_cache_usage=0.0, kv_cache_tokens=128
    )


def test_server_says_which_file_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["--model", "/gone/x.gguf", "--alias", "chat", "--port", "1"])

    assert status == 1
    assert "/gone/x.gguf: no such file on this node" in capfd.readouterr().out


@pytest.mark.parametrize("flag", ["--mmproj", "--chat-template-file"])
def test_server_says_which_other_file_is_missing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, flag: str
) -> None:
    file = tmp_path / "x.gguf"
    file.touch()

    status = main(["--model", str(file), "--alias", "chat", "--port", "1", flag, "/gone/y"])

    assert status == 1
    assert f"{flag} /gone/y: no such file on this node" in capfd.readouterr().out


def test_server_says_that_parts_of_a_model_are_missing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for part in (1, 3):
        (tmp_path / f"[x]-0000{part}-of-00003.gguf").touch()
    file = tmp_path / "[x]-00001-of-00003.gguf"

    status = main(["--model", str(file), "--alias", "chat", "--port", "1"])

    assert status == 1
    assert f"{file}: 2 of 3 parts are there on this node" in capfd.readouterr().out


def test_server_says_what_is_wrong_with_a_split(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--model", "x.gguf", "--alias", "chat", "--port", "1", "--tensor-split", "1,many"]

    with pytest.raises(SystemExit):
        main(command)

    assert "--tensor-split: '1,many': numbers with commas" in capfd.readouterr().err


def test_sampling_is_openais_where_a_client_says_nothing() -> None:
    options = parser().parse_args(["--model", "x.gguf", "--alias", "chat", "--port", "1"])

    sampling = common_params(options).sampling

    assert (sampling.temp, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)


def test_server_says_how_much_host_memory_is_missing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "x.gguf"
    file.touch()
    needed = str(2**60)

    command = ["--model", str(file), "--alias", "chat", "--port", "1"]
    status = main([*command, "--host-memory-bytes", needed])

    assert status == 1
    assert "the plan needs 1073741824.0 GiB of host memory" in capfd.readouterr().out


def test_server_refuses_layers_for_gpus_that_it_does_not_see(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "x.gguf"
    file.touch()

    command = ["--model", str(file), "--alias", "chat", "--port", "1", "--n-gpu-layers", "9"]
    status = main([*command, "--tensor-split", ",".join(["1"] * 100)])

    assert status == 1
    assert "layers on 100 GPUs" in capfd.readouterr().out
