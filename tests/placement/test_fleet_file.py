from __future__ import annotations

from pathlib import Path

import pytest

from placement.errors import ConfigError
from placement.fleet_file import load_fleet
from placement.plan import Plan
from placement.planner import make_plan
from placement.spec import dump_yaml, parse_yaml
from tests.placement.builders import CATALOGUE, a_pool, an_inventory
from tests.placement.trace_files import a_record, write_trace

FLEET = """\
fleet: demo
models:
  - name: chat
    model: mistral-7b
    demand: {trace: t.csv}
"""


def fleet_file(folder: Path, text: str = FLEET) -> Path:
    write_trace(folder / "t.csv", [a_record(float(n), model="chat") for n in range(0, 121, 2)])
    path = folder / "fleet.yaml"
    path.write_text(text)
    return path


def complaints(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_fleet(path)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_a_trace_stands_for_its_numbers_and_lies_beside_the_fleet(tmp_path: Path) -> None:
    (model,) = load_fleet(fleet_file(tmp_path)).models

    assert model.demand is not None
    assert model.demand.requests_per_s == 0.5
    assert model.demand.input_tokens.mean == 100
    assert model.demand.source.startswith("from t.csv: 61 requests in 2 minutes, ")


def test_a_plan_carries_the_numbers_and_not_the_file(tmp_path: Path) -> None:
    path = fleet_file(tmp_path)
    plan = make_plan(load_fleet(path), an_inventory(a_pool()), CATALOGUE)
    (tmp_path / "t.csv").unlink()

    assert plan.demands["chat"].requests_per_s == 0.5
    assert parse_yaml(dump_yaml(plan), Plan, source="plan.yaml") == plan


def test_what_else_a_demand_says_is_kept(tmp_path: Path) -> None:
    text = FLEET.replace("t.csv}", "t.csv, prefix_hit: 0.25, rate_scale: 4, model: chat}")
    (model,) = load_fleet(fleet_file(tmp_path, text)).models

    assert model.demand is not None
    assert (model.demand.prefix_hit, model.demand.requests_per_s) == (0.25, 2.0)


def test_a_fleet_without_traces_is_read_as_ever(tmp_path: Path) -> None:
    path = fleet_file(tmp_path, FLEET.replace("trace: t.csv", "requests_per_s: 3.0"))

    assert [each.demand.in_words for each in load_fleet(path).models if each.demand] == [
        "3 requests/s, prompts of 512 tokens, answers of 128"
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "t.csv",
            "gone.csv",
            (
                "fleet.yaml:5: models[0].demand.trace: gone.csv: no such file; a trace is looked for "
                "beside the fleet"
            ),
        ),
        (
            "t.csv",
            "t.csv, modl: chat",
            "fleet.yaml:5: models[0].demand.modl: unknown key; did you mean 'model'?",
        ),
        (
            "t.csv",
            "t.csv, requests_per_s: 3.0",
            (
                "fleet.yaml:5: models[0].demand.requests_per_s: is derived from the trace; leave out "
                "either of them"
            ),
        ),
        (
            "t.csv",
            "t.csv, duration_s: 30.0",
            (
                "fleet.yaml:5: models[0].demand.duration_s: input should be greater than or equal to "
                "60, got 30.0"
            ),
        ),
        (
            "trace: t.csv",
            "trace: 7",
            (
                "fleet.yaml:5: models[0].demand.trace: input should be a valid string, got 7; in quotes"
                ' it is text: "7"'
            ),
        ),
        (
            "t.csv}",
            "t.csv}\n    max_model_len: 50",
            (
                "fleet.yaml:6: models[0].max_model_len: 50 tokens are fewer than a usual request of "
                "the demand has, prompt and answer: 110; give more, or shorter input_tokens and "
                "output_tokens"
            ),
        ),
    ],
)
def test_mistakes_are_told_with_their_place_in_the_fleet(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    assert complaints(fleet_file(tmp_path, FLEET.replace(old, new))) == [told]


def test_a_wrong_trace_hides_no_other_mistake(tmp_path: Path) -> None:
    text = FLEET.replace("t.csv", "gone.csv").replace("model:", "modell:") + "spare: 1\n"

    assert [line.split(": ")[1] for line in complaints(fleet_file(tmp_path, text))] == [
        "models[0].demand.trace",
        "models[0].model",
        "models[0].modell",
        "spare",
    ]
