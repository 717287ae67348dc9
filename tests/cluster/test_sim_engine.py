import subprocess
import sys
from typing import Any

import pytest

from cluster.engines.sim import SimEngine, tpot_ms
from cluster.engines.sim_batch import Timing
from placement.fleet import ReplicaBounds, ScalingPolicy
from placement.plan import GpuMemory, Predicted, Prediction, Shape, Variant


def a_shape(**changes: Any) -> Shape:
    memory = GpuMemory(
        total_bytes=80 * 2**30,
        weights_bytes=24 * 2**30,
        activation_bytes=0,
        non_torch_bytes=0,
        cuda_graph_bytes=0,
        kv_cache_bytes=48 * 2**30,
        headroom_bytes=0,
    )
    shape = Shape(
        engine="sim",
        precision="fp8",
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.9,
        per_gpu=memory,
        kv_bytes_per_token=160 * 1024,
        kv_cache_tokens=314_000,
        max_concurrency=76.6,
        num_layers=40,
        prediction=Prediction(ttft_s=0.1, tpot_ms=20.0, output_tokens_per_s=1000.0),
    )
    return shape.model_copy(update=changes)


def a_variant(**changes: Any) -> Variant:
    return Variant(
        model="chat",
        variant="chat@h100-fp8",
        catalogue_model="mistral-small-3.2-24b-2506",
        checkpoint="nowhere",
        pool="h100",
        gpu="H100-SXM",
        shape=a_shape(**changes),
        replicas=1,
        bounds=ReplicaBounds(),
        scaling=ScalingPolicy(),
        placement=(),
        capacity_requests_per_s=1.0,
        predicted=Predicted(ttft_p95_s=0.1, tpot_p95_ms=20.0, utilization=0.5),
    )


def test_prediction_is_met_at_the_load_it_was_made_for() -> None:
    shape = a_shape()
    command = SimEngine().launch(a_variant(), checkpoint="x", host="h", port=1, api_key="k").command
    flags = dict(zip(command[3::2], command[4::2], strict=True))
    timing = Timing(
        float(flags["--prefill-tokens-per-s"]),
        float(flags["--tpot-ms"]),
        float(flags["--tpot-ms-at-max"]),
        int(flags["--max-num-seqs"]),
    )
    num_running = int(shape.prediction.output_tokens_per_s * shape.prediction.tpot_ms / 1000)

    assert timing.step_s(num_requests=1, prefill_tokens=512) == pytest.approx(0.1, rel=1e-3)
    assert timing.step_s(num_requests=num_running, prefill_tokens=0) == pytest.approx(
        0.020, rel=1e-3
    )
    assert timing.tpot_ms < 20.0 < timing.tpot_ms_at_max


@pytest.mark.parametrize("weights_bytes", [0, 1, 10**12])
def test_tpot_is_positive_and_does_not_fall_with_the_batch(weights_bytes: int) -> None:
    shape = a_shape(
        per_gpu=a_shape().per_gpu.model_copy(update={"weights_bytes": weights_bytes}),
        kv_bytes_per_token=0,
        prediction=Prediction(ttft_s=0.0, tpot_ms=0.0, output_tokens_per_s=0.0),
    )

    assert 0 < tpot_ms(shape, 1, 512) <= tpot_ms(shape, 64, 512)


def test_launched_process_logs_its_facts_and_ends_at_sigterm() -> None:
    engine = SimEngine()
    launch = engine.launch(
        a_variant(engine_args=("--enforce-eager", "--sim-speed", "20", "--sim-port=0")),
        checkpoint="nowhere",
        host="127.0.0.1",
        port=8000,
        api_key="secret",
    )
    log, stages = "", []
    with subprocess.Popen(launch.command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            log += line
            stages.append(engine.stage(line))
            if stages[-1] == "ready":
                break
        process.terminate()

    assert process.returncode == 0
    assert launch.env == {"VLLM_API_KEY": "secret"}
    facts = engine.facts(log)
    assert (facts.kv_cache_tokens, facts.weights_bytes) == (314_000, 24 * 2**30)
    assert stages == ["loading weights", None, "starting the server", "ready"]


def test_fault_switch_ends_the_process_with_status_1() -> None:
    command = [sys.executable, "-m", "cluster.engines.sim_server", "--model", "chat"]
    drill = ["--start-delay-s", "60", "--fail-after-s", "0.01"]

    done = subprocess.run([*command, *drill], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "simulated failure" in done.stdout


def test_kv_cache_that_cannot_hold_one_request_is_refused() -> None:
    command = [sys.executable, "-m", "cluster.engines.sim_server", "--model", "chat"]

    done = subprocess.run(
        [*command, "--kv-cache-tokens", "100"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "must hold one request of --max-model-len (32768 tokens)" in done.stderr


def test_server_imports_nothing_heavy() -> None:
    program = (
        "import sys, cluster.engines.sim_server; "
        "print({'ray', 'torch', 'vllm', 'numpy'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert done.stdout == b"set()\n"
