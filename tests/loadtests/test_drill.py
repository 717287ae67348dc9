import math
from collections import Counter

import pytest

from loadtests.drill_gateway import main, table
from loadtests.drill_questions import questions
from loadtests.drill_scenarios import SCENARIOS, Row


def a_row(**changes: object) -> Row:
    values = {"name": "kill", "requests": 8, "migrations": 3.0, "ttft_p50_s": 0.02, **changes}
    return Row(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"failed": 1},
        {"duplicated_tokens": 1},
        {"missing_tokens": 1},
        {"misses": ["2 requests still counted in flight"]},
    ],
)
def test_one_wrong_stream_or_anything_left_over_misses_the_row(change: dict[str, object]) -> None:
    assert a_row().passed
    assert not a_row(**change).passed


def test_table_names_what_was_missed_and_the_published_figures() -> None:
    text = table([a_row(), a_row(name="slow", failed=2, notes=["5 s"], migrations=math.nan)])

    assert "| kill | 8 | 0 | 0 | 0 | 3 | 20 |" in text
    assert "| slow | 8 | 2 | 0 | 0 | ? |" in text
    assert "| NVIDIA Dynamo, 1 replica, published | 800 | 280 |" in text
    assert text.endswith("1 of 2 rows hold\nmissed: slow")


def test_questions_are_the_same_in_every_run_and_of_every_form() -> None:
    asked = questions(96, model="chat", max_tokens=100)

    assert asked == questions(96, model="chat", max_tokens=100)
    assert len({str(one.body) for one in asked}) == 96
    forms = Counter(
        (one.chat, one.wants_usage, one.wants_ids, "stop" in one.body, "ignore_eos" in one.body)
        for one in asked
    )
    assert len(forms) >= 8
    assert sum(one.chat for one in asked) == 48


def test_scenarios_have_names_of_their_own() -> None:
    assert len({one.name for one in SCENARIOS}) == len(SCENARIOS)


def test_unknown_scenario_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown: flood; known: undisturbed"):
        main(["--only", "flood"])


def test_drill_of_running_processes_finds_nothing_wrong_with_an_undisturbed_gateway(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = main(["--quick", "--engines", "2", "--only", "undisturbed,status-500"])

    assert status == 0
    assert "| undisturbed | 64 | 0 | 0 | 0 |" in capsys.readouterr().out
