from __future__ import annotations

from pathlib import Path

import pytest

from placement.errors import ConfigError
from placement.fleet import FleetSpec
from placement.inventory import Inventory
from placement.spec import Spec, dump_yaml, load_yaml, parse_yaml

GOOD = """\
fleet: demo
models:
  - name: chat
    model: mixtral
    replicas: {min: 0, max: 2}
"""


def complaints(text: str, spec: type[Spec] = FleetSpec) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, spec, source="f.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            GOOD.replace("replicas", "replica"),
            "f.yaml:5: models[0].replica: unknown key; did you mean 'replicas'?",
        ),
        (
            GOOD.replace("max: 2", "max: two"),
            "f.yaml:5: models[0].replicas.max: input should be a valid integer, got 'two'",
        ),
        (
            GOOD.replace("    model: mixtral\n", ""),
            "f.yaml:3: models[0].model: required, but missing",
        ),
        (
            GOOD + "fleet: again\n",
            "f.yaml:6: fleet: the key stands twice (first on line 1)",
        ),
        (
            GOOD.replace("min: 0", "min: 3"),
            "f.yaml:5: models[0].replicas: min (3) is more than max (2)",
        ),
        (
            GOOD + "    engine_args: [--max-model-len=4096]\n",
            (
                "f.yaml:6: models[0].engine_args: --max-model-len=4096 would contradict the plan; "
                "use max_model_len"
            ),
        ),
        ("", "f.yaml: the file is empty"),
    ],
)
def test_a_mistake_is_one_line_with_file_line_key_and_what_was_expected(
    text: str, expected: str
) -> None:
    assert complaints(text) == [expected]


def test_a_wrong_item_does_not_also_make_its_list_too_short() -> None:
    (line,) = complaints("pools:\n  - {name: a, gpu: H100}\n", Inventory)

    assert line == "f.yaml:2: pools[0].gpus_per_node: required, but missing"


def test_an_empty_list_is_still_too_short() -> None:
    (line,) = complaints("pools: []\n", Inventory)

    assert line.startswith("f.yaml:1: pools: ")


def test_every_mistake_is_told_at_once() -> None:
    lines = complaints(GOOD.replace("max: 2", "max: 0, step: 1"))

    assert [line.split(": ")[1] for line in lines] == [
        "models[0].replicas.max",
        "models[0].replicas.step",
    ]


def test_broken_yaml_names_its_line() -> None:
    (line,) = complaints("fleet: [demo\nmodels: {}\n")

    assert line.startswith("f.yaml:2: not valid YAML:")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file"):
        load_yaml(tmp_path / "gone.yaml", FleetSpec)


def test_two_models_may_not_answer_to_one_name() -> None:
    twice = GOOD + "  - {name: other, model: mixtral, aliases: [chat]}\n"

    assert "two models of the fleet answer to the name 'chat'" in complaints(twice)[0]


def test_a_cpu_pool_must_say_how_much_memory_a_slot_has() -> None:
    text = "pools:\n  - {name: a, gpu: cpu, gpus_per_node: 2}\n"

    assert "memory_gib_per_gpu and kv_cache_gib_per_gpu" in complaints(text, Inventory)[0]


def test_what_is_written_reads_back() -> None:
    fleet = parse_yaml(GOOD, FleetSpec, source="f.yaml")

    assert parse_yaml(dump_yaml(fleet), FleetSpec, source="again") == fleet
