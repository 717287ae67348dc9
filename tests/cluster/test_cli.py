"""The command line as a user meets it: exit codes, clean JSON, errors that say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.context import Context

GOOD = """
fleet: demo
models:
  - {name: chat, model: mixtral-8x7b, engine: sim, simulate_gpu: H100-SXM}
"""


def bora(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        env={**os.environ, "BORA_STATE": str(state)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("fleet: [", ":1: not valid YAML"),
        ("fleet: demo", ":1: models: required, but missing"),
        (GOOD + "modles: []", ":5: modles: unknown key; did you mean 'models'?"),
        (GOOD.replace("sim,", "simm,"), ":4: models[0].engine"),
        (GOOD + "gateway: {http_port: eighty}", ":5: gateway.http_port: input should be"),
        (GOOD + "gateway: {http_port: 80}\ngateway: {}", ":6: gateway: the key stands twice"),
        (GOOD.replace("chat", "'a b'"), ":4: models[0].name"),
        (GOOD.replace("mixtral-8x7b", "mixtral-8x7"), ":4: models[0].model: unknown model"),
        (GOOD.replace("mixtral-8x7b", "mixtral-8x7"), "did you mean 'mixtral-8x7b'"),
        (GOOD.replace("H100-SXM", "H999"), ":4: models[0].simulate_gpu: unknown GPU type 'H999'"),
        (GOOD.replace("engine: sim, ", ""), ":4: models[0]: simulate_gpu: H100-SXM means nothing"),
        (GOOD.replace("chat,", "chat, pools: [h1],"), ":4: models[0].pools[0]: unknown pool 'h1'"),
        (GOOD.replace("chat,", "chat, max_model_len: 99999,"), "give 32768 or less"),
        (
            GOOD.replace("chat,", "chat, precision: [mxfp4],"),
            ":4: models[0].precision: mixtral-8x7b has no checkpoint in mxfp4; known: ",
        ),
        (GOOD.replace("mixtral-8x7b", "gpt-5"), "`bora models` lists those that are known"),
        (GOOD.replace("mixtral-8x7b", "./gone"), ":4: models[0].model: ./gone: no such file"),
        (
            GOOD.replace("chat,", "chat, canary: {weight: 0.1, model: ./gone},"),
            ":4: models[0].canary.model: ./gone: no such file",
        ),
        ("fleet: 2020-13-45", ":1: fleet: '2020-13-45' is not a valid timestamp"),
        ("fleet: &a [*a]", ":1: fleet[0]: an alias that contains itself"),
        ("[" * 3000, ":1: nested more than"),
    ],
)
def test_a_wrong_fleet_file_is_exit_2_with_file_line_and_key(tmp_path: Path, text: str, said: str):
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(text)

    result = bora(tmp_path, "plan", str(fleet))

    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_gpu_that_only_a_gpu_pool_would_ignore_is_refused_too(tmp_path: Path):
    fleet, inventory = tmp_path / "fleet.yaml", tmp_path / "inventory.yaml"
    fleet.write_text(GOOD.replace("H100-SXM", "H999"))
    inventory.write_text("pools: [{name: h, gpu: H100-SXM, gpus_per_node: 8}]")

    result = bora(tmp_path, "plan", str(fleet), "--inventory", str(inventory))

    assert result.returncode == 2
    assert f"{fleet}:4: models[0].simulate_gpu: unknown GPU type 'H999'" in result.stderr


def test_an_unknown_gpu_in_the_inventory_is_exit_2_with_file_line_and_key(tmp_path: Path):
    fleet, inventory = tmp_path / "fleet.yaml", tmp_path / "inventory.yaml"
    fleet.write_text(GOOD)
    inventory.write_text("pools:\n  - {name: h, gpu: H101-SXM, gpus_per_node: 8}")

    result = bora(tmp_path, "plan", str(fleet), "--inventory", str(inventory))

    assert result.returncode == 2
    assert f"{inventory}:2: pools[0].gpu: unknown GPU type 'H101-SXM'" in result.stderr


def test_a_plan_that_cannot_be_written_is_exit_2_with_path_and_cause(tmp_path: Path):
    fleet, out = tmp_path / "fleet.yaml", tmp_path / "nowhere" / "plan.yaml"
    fleet.write_text(GOOD)

    result = bora(tmp_path, "plan", str(fleet), "--out", str(out))

    assert result.returncode == 2
    assert f"{out}: cannot be written: No such file or directory" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [("status",), ("plan", "fleet.yaml"), ("down",), ("up",)])
@pytest.mark.parametrize("state", ["file", "file/below", "context"])
def test_a_state_folder_that_is_none_is_exit_2_with_path_and_cause(
    tmp_path: Path, command: tuple[str, ...], state: str
):
    (tmp_path / "file").write_text("")
    (tmp_path / "context" / "context.json").mkdir(parents=True)
    (tmp_path / "fleet.yaml").write_text(GOOD)
    fleet = [str(tmp_path / part) if part.endswith(".yaml") else part for part in command]

    result = bora(tmp_path / state, *fleet)

    assert result.returncode == 2
    assert str(tmp_path / state.partition("/")[0]) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_file_is_exit_2(tmp_path: Path):
    result = bora(tmp_path, "plan", str(tmp_path / "nowhere.yaml"))

    assert result.returncode == 2
    assert "no such file" in result.stderr


def test_plan_prints_one_json_document_and_writes_yaml_that_reads_back(tmp_path: Path):
    fleet, out = tmp_path / "fleet.yaml", tmp_path / "plan.yaml"
    fleet.write_text(GOOD)

    result = bora(tmp_path, "plan", str(fleet), "--json", "--out", str(out))

    assert result.returncode == 0
    assert json.loads(result.stdout)["variants"][0]["model"] == "chat"
    assert "chat@" in out.read_text()


def test_an_impossible_fleet_is_exit_3_and_still_prints_why(tmp_path: Path):
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("fleet: x\nmodels: [{name: big, model: mistral-large-3-675b-2512}]")

    result = bora(tmp_path, "plan", str(fleet), "--json")

    assert result.returncode == 3
    answer = json.loads(result.stdout)
    assert answer["status"] == "infeasible"
    assert answer["unmet"][0]["model"] == "big"
    assert answer["unmet"][0]["cheapest_relaxation"]


def test_a_pool_that_the_inventory_does_not_have_is_named(tmp_path: Path):
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(GOOD.replace("engine", "pools: [h100], engine"))

    result = bora(tmp_path, "plan", str(fleet))

    assert result.returncode == 2
    assert "h100" in result.stderr
    assert "local" in result.stderr


@pytest.mark.parametrize("command", [("status",), ("logs", "chat"), ("scale", "chat", "2")])
def test_without_a_cluster_commands_are_exit_4_and_say_how_to_start_one(
    tmp_path: Path, command: tuple[str, ...]
):
    result = bora(tmp_path, *command)

    assert result.returncode == 4
    assert "bora up" in result.stderr


def test_a_controller_that_is_gone_is_exit_4(tmp_path: Path):
    gone = Context(
        ray_address="127.0.0.1:1",
        ray_tmpdir="",
        controller_url="http://127.0.0.1:1",
        token="t",
        run_dir=str(tmp_path),
        supervisor_pid=2**22 - 1,
    )
    (tmp_path / "context.json").write_text(gone.model_dump_json())

    assert bora(tmp_path, "status").returncode == 4
    assert bora(tmp_path, "down").returncode == 0
    assert not (tmp_path / "context.json").exists()


@pytest.mark.parametrize("command", ["models", "gpus"])
def test_the_catalogue_is_shown_and_is_json_on_request(tmp_path: Path, command: str):
    page, document = bora(tmp_path, command), bora(tmp_path, command, "--json")

    entries = json.loads(document.stdout)
    assert len(entries) > 5
    assert all(entry["name"] in page.stdout for entry in entries)


def test_the_command_line_does_not_import_ray_vllm_or_torch():
    code = "import sys, cluster.cli; print(*sorted({'ray', 'vllm', 'torch'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == ""


FAMILY = (
    "models: [{name: chat, model: mistral-7b, pools: [POOL], replicas: {min: 1, max: 2}}]\n"
    "fleet: demo\n"
)
TWO_POOLS = "pools: [{name: h, gpu: H100-SXM, gpus_per_node: 8}, {name: a, gpu: A100-80-SXM, gpus_per_node: 8}]"


def planned(folder: Path, *options: str, pool: str = "h") -> subprocess.CompletedProcess[str]:
    fleet, inventory = folder / f"{pool}.yaml", folder / "inventory.yaml"
    fleet.write_text(FAMILY.replace("POOL", pool))
    inventory.write_text(TWO_POOLS)
    return bora(folder, options[0], str(fleet), "--inventory", str(inventory), *options[1:])


def test_a_diff_tells_what_moving_a_model_costs(tmp_path: Path):
    running = tmp_path / "running.yaml"
    assert planned(tmp_path, "plan", "--out", str(running)).returncode == 0

    same = planned(tmp_path, "diff", "--from", str(running), "--json")
    moved = planned(tmp_path, "diff", "--from", str(running), "--json", pool="a")
    shown = planned(tmp_path, "diff", "--from", str(running), pool="a")

    assert json.loads(same.stdout)["changes"] == []
    answer = json.loads(moved.stdout)
    assert [change["kind"] for change in answer["changes"]] == ["create", "delete"]
    assert answer["bytes_to_load"] > 10**10
    assert answer["cost_per_hour_after"] < answer["cost_per_hour_before"]
    assert "GB to load" in shown.stdout


def test_a_diff_without_a_cluster_is_exit_4(tmp_path: Path):
    assert planned(tmp_path, "diff").returncode == 4


def test_a_plan_is_written_as_page_and_picture_and_explained(tmp_path: Path):
    page, picture = tmp_path / "plan.html", tmp_path / "plan.svg"

    result = planned(
        tmp_path, "plan", "--html", str(page), "--svg", str(picture), "--explain", "--json"
    )

    answer = json.loads(result.stdout)
    assert answer["solve_s"] > 0
    assert answer["explanation"]["reasons"][0]["model"] == "chat"
    assert page.read_text().startswith("<!doctype html>")
    assert picture.read_text().startswith("<svg ")


def test_a_page_that_cannot_be_written_is_exit_2(tmp_path: Path):
    result = planned(tmp_path, "plan", "--html", str(tmp_path / "nowhere" / "plan.html"))

    assert result.returncode == 2
    assert "--html" in result.stderr
