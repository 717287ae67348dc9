from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from placement.errors import ConfigError, UnknownName
from placement.fleet import FleetSpec
from placement.spec import parse_yaml
from tests.placement.header_files import a_mistral_gguf, safetensors_bytes
from tests.placement.test_hf_config import MISTRAL

LARGE_3, SMALL = "mistral-large-3-675b-2512", "mistral-small-3.2-24b-2506"


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["fit", *args])


def bora(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", "fit", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_json_is_one_document_and_nothing_else():
    done = bora(LARGE_3, "--gpu", "H200-SXM:8", "--precision", "fp8", "--json")

    assert done.returncode == 0
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer["verdict"] == "fits"
    assert answer["best"]["tensor_parallel_size"] == 8


def test_what_does_not_fit_is_said_in_full_and_ends_with_3():
    done = bora(LARGE_3, "--gpu", "H100-SXM:8", "--precision", "fp8", "--json")

    assert done.returncode == 3
    answer = json.loads(done.stdout)
    assert answer["verdict"] == "does_not_fit"
    assert answer["best"] is None
    assert answer["rejected"]
    assert answer["advice"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((SMALL, "--gpu", "H100-SXN"), "did you mean 'H100-SXM'"),
        (("mistral-smal-3.2", "--gpu", "4090"), "did you mean"),
        ((SMALL, "--gpu", "4090", "--precision", "q4km"), "q4_k_m"),
        ((SMALL, "--gpu", "4090:2", "--tensor-parallel-size", "4"), "multiply to 4 GPUs"),
        (("--gpu", "4090"), "a MODEL is needed"),
        ((SMALL, "--gpu", "4090", "--json", "--helm"), "give one of them"),
        (("./nowhere.gguf", "--gpu", "4090"), "no such file"),
    ],
)
def test_bad_usage_is_explained_and_ends_with_2(args: tuple[str, ...], message: str):
    done = bora(*args)

    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_corrupt_header_is_explained_and_ends_with_2(tmp_path: Path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(a_mistral_gguf()[:500])

    done = bora(str(file), "--gpu", "4090")

    assert done.returncode == 2
    assert "truncated" in done.stderr


def test_the_page_shows_verdict_memory_shapes_command_and_fleet():
    done = run(LARGE_3, "--gpu", "H100-SXM:8")

    assert done.exit_code == 0
    for part in ("fits on 8 x H100-SXM", "each of 8 [", "KV cache", "vllm nvfp4 TP8", "not possible",
                 "--tensor-parallel-size 8", "fleet: mistral-large-3", "the vendor's figure"):  # fmt: skip
        assert part in done.output


def test_the_page_of_what_does_not_fit_shows_the_ways_out():
    done = run("mixtral-8x7b", "--gpu", "L40S:2", "--precision", "bf16")

    assert done.exit_code == 3
    assert "does not fit on 2 x L40S" in done.output
    assert "cheapest ways out" in done.output
    assert "weights-exceed-memory" in done.output


def test_the_fleet_on_the_page_is_a_valid_fleet():
    output = run(SMALL, "--gpu", "H100-SXM", "--precision", "bf16").output
    text = output[output.index("\nfleet: ") + 1 :].split("\n\n")[0].split("\nnotes")[0]

    fleet = parse_yaml(text, FleetSpec, source="page")

    assert fleet.models[0].model == SMALL
    assert fleet.models[0].precision == ("bf16",)


@pytest.mark.parametrize("copies", ["1", "2"])
def test_the_fleet_of_a_replica_over_nodes_says_how_they_share_the_model(copies: str):
    where = ("--gpu", "H100-SXM:8", "--nodes", "2", "--precision", "fp8")
    output = run(LARGE_3, *where, "--data-parallel-size", copies).output
    text = output[output.index("\nfleet: ") + 1 :].split("\n\n")[0].split("\nnotes")[0]

    [model] = parse_yaml(text, FleetSpec, source="page").models

    assert (model.nodes_per_replica, model.data_parallel_size) == (2, int(copies))


def test_helm_values_name_gpus_context_and_flags():
    vllm = yaml.safe_load(run(SMALL, "--gpu", "H100-SXM", "--precision", "bf16", "--helm").output)
    [spec] = vllm["servingEngineSpec"]["modelSpec"]
    assert spec["requestGPU"] == 1
    assert spec["vllmConfig"]["maxModelLen"] > 8192
    assert "--max-num-batched-tokens" in spec["vllmConfig"]["extraArgs"]

    llama = yaml.safe_load(run(SMALL, "--gpu", "4090", "--precision", "q4_k_m", "--helm").output)
    assert llama["llamacpp"]["gpuLayers"] == 40
    assert llama["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_without_a_gpu_all_types_are_ranked():
    done = run(SMALL, "--json")

    ranking = json.loads(done.output)["ranking"]
    assert ranking[0]["verdict"] == "fits"
    assert {entry["num_gpus"] for entry in ranking} == {1, 2, 4, 8}
    assert "cheapest first" in run(SMALL).output


def test_explain_holds_claims_against_our_numbers():
    page = run("--explain").output
    claims = json.loads(run("--explain", "--json").output)

    assert "4 x RTX 4090" in page
    assert {claim["page"] for claim in claims} >= {"Clore.ai", "Prositronic"}
    assert not any(claim["holds"] for claim in claims if "4 x RTX 4090" in claim["says"])


def test_a_folder_with_weights_is_measured(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    weights = safetensors_bytes({"w": ("BF16", (128, 128))})
    (tmp_path / "model.safetensors").write_bytes(weights)

    answer = json.loads(run(str(tmp_path), "--gpu", "H100-SXM", "--json").output)

    assert answer["sizes_from"] == "header"
    assert answer["checkpoint_bytes"] == 2 * 128 * 128


def test_a_gguf_file_runs_in_llama_cpp(tmp_path: Path):
    (tmp_path / "tiny.gguf").write_bytes(a_mistral_gguf())

    answer = json.loads(run(str(tmp_path / "tiny.gguf"), "--gpu", "4090", "--json").output)

    assert answer["best"]["engine"] == "llamacpp"
    assert answer["best"]["engine_args"][:2] == ["--model", str(tmp_path / "tiny.gguf")]


def test_part_of_a_name_will_do_when_only_one_model_has_it():
    answer = json.loads(run("pixtral-12b", "--gpu", "H100-SXM", "--json").output)

    assert answer["model"] == "pixtral-12b-2409"


def test_errors_are_of_the_planner():
    assert isinstance(run(SMALL, "--gpu", "H100:0").exception, ConfigError)
    assert isinstance(run("no-such-model-at-all").exception, UnknownName)


def test_an_older_vllm_has_other_memory_constants():
    options = ("mistral-nemo-12b", "--gpu", "H100-SXM", "--precision", "bf16", "--json")
    tokens = [
        json.loads(run(*options, "--vllm-release", release).stdout)["best"]["kv_cache_tokens"]
        for release in ("0.6", "0.19")
    ]

    assert tokens[0] < tokens[1]


def test_a_release_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="vllm-release"):
        app(["fit", SMALL, "--gpu", "H100", "--vllm-release", "new"], standalone_mode=False)


def test_on_a_cpu_the_memory_is_this_machines_unless_told():
    asked = ("nano-mixtral", "--gpu", "cpu", "--engine", "vllm", "--json")
    here = json.loads(run(*asked).stdout)
    small = run(*asked, "--host-memory-gib", "1")

    assert here["verdict"] in ("fits", "tight")
    assert json.loads(small.stdout)["verdict"] != "fits"


def test_cached_prompts_and_accepted_drafts_make_answers_faster():
    load = ("--gpu", "H100-SXM", "--concurrency", "16", "--input-tokens", "4000", "--json")

    plain, cached, drafted = (
        json.loads(run(SMALL, *load, *more).stdout)["best"]["prediction"]
        for more in ((), ("--prefix-hit", "0.8"), ("--acceptance-rate", "0.8"))
    )

    assert cached["ttft_s"] < plain["ttft_s"]
    assert drafted["tpot_ms"] < plain["tpot_ms"]
    assert 0 < plain["tpot_error"] < 0.5


def test_a_share_above_one_is_refused():
    with pytest.raises(ConfigError, match="prefix-hit"):
        app(["fit", SMALL, "--gpu", "H100", "--prefix-hit", "80"], standalone_mode=False)


def test_the_page_tells_how_far_such_predictions_were_off():
    assert "±" in run(SMALL, "--gpu", "H100-SXM").stdout
