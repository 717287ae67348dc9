from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.demand import Demand
from placement.errors import ConfigError
from placement.trace_demand import TraceDemand, demand_of, percentile
from tests.placement.trace_files import Records, a_record, write_trace

LENGTHS = st.lists(st.integers(1, 100_000), min_size=2, max_size=50)


def derived(folder: Path, records: Records, **wish: Any) -> Demand:
    write_trace(folder / "t.jsonl", records)
    return demand_of(TraceDemand(trace="t.jsonl", **wish), folder)


def minutes(*counts: int, **changes: Any) -> list[dict[str, Any]]:
    """So many requests in each minute, the first at its very start."""
    return [
        a_record(60.0 * minute + 59.0 * n / count, **changes)
        for minute, count in enumerate(counts)
        for n in range(count)
    ]


@given(values=st.lists(st.integers(0, 1000), min_size=1), percent=st.floats(0, 100))
def test_percentiles_of_counts_are_those_of_the_values(values: list[int], percent: float) -> None:
    assert percentile(Counter(values), percent) == pytest.approx(np.percentile(values, percent))


@given(inputs=LENGTHS, outputs=LENGTHS)
def test_lengths_are_the_mean_and_95th_percentile_of_the_trace(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[int], outputs: list[int]
) -> None:
    number = min(len(inputs), len(outputs))
    inputs, outputs = inputs[:number], outputs[:number]
    lengths = enumerate(zip(inputs, outputs, strict=True))
    records = [a_record(60.0 * n, input_tokens=i, output_tokens=o) for n, (i, o) in lengths]

    demand = derived(tmp_path_factory.mktemp("trace"), records)

    for found, values in ((demand.input_tokens, inputs), (demand.output_tokens, outputs)):
        assert found.mean == pytest.approx(np.mean(values))
        p95 = np.percentile(values, 95)
        assert (found.p95 or found.mean) == pytest.approx(max(p95, np.mean(values)))


@given(
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=30).filter(lambda c: c[0] and c[-1])
)
def test_at_least_99_percent_of_requests_come_in_minutes_no_busier_than_planned(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int]
) -> None:
    records = [*minutes(*counts), a_record(60.0 * len(counts))]  # the last minute is over

    demand = derived(tmp_path_factory.mktemp("trace"), records)

    all_counts = np.array([*counts, 1])
    planned = demand.requests_per_s * 60
    assert planned == pytest.approx(round(planned))
    no_busier = all_counts[all_counts <= round(planned)].sum()
    less_busy = all_counts[all_counts < round(planned)].sum()
    assert no_busier >= 0.99 * all_counts.sum() > less_busy


def test_of_an_hour_the_busiest_minute_counts_and_of_days_no_freak(tmp_path: Path) -> None:
    hour = derived(tmp_path, minutes(*[6] * 30, 30, *[6] * 29))
    days = derived(tmp_path, minutes(*[6] * 900, 30, *[6] * 900))

    assert hour.requests_per_s == 0.5
    assert days.requests_per_s == 0.1
    assert "busiest minute 0.5/s" in days.source


def test_silent_nights_change_nothing(tmp_path: Path) -> None:
    day = minutes(3, 9, 6, 4)
    night = [{**each, "timestamp_s": each["timestamp_s"] + 86_400} for each in day]

    assert derived(tmp_path, day).requests_per_s == derived(tmp_path, [*day, *night]).requests_per_s


def test_minutes_begin_with_the_first_request(tmp_path: Path) -> None:
    late = [{**each, "timestamp_s": each["timestamp_s"] + 1e9 + 31} for each in minutes(6, 12, 6)]

    assert derived(tmp_path, late).requests_per_s == 0.2


def test_only_what_is_asked_for_counts(tmp_path: Path) -> None:
    chat = minutes(6, 12, 6, 30, model="chat", input_tokens=50)
    code = minutes(60, 60, 60, 60, model="code")
    records = sorted([*chat, *code], key=lambda each: each["timestamp_s"])

    whole = derived(tmp_path, records)
    part = derived(tmp_path, records, model="chat", start_s=60, duration_s=120, rate_scale=2.5)

    assert whole.requests_per_s == 1.5
    assert "294 requests of all 2 models" in whole.source
    assert part.requests_per_s == pytest.approx(0.5)
    assert part.input_tokens.mean == 50
    assert "18 requests of chat in 2 minutes, rates times 2.5" in part.source


def test_rows_after_the_time_asked_for_are_not_read(tmp_path: Path) -> None:
    records = [*minutes(6, 6), a_record(60.0), a_record(300.0), a_record(-1)]

    assert (
        derived(tmp_path, [*minutes(6, 6, 6), a_record(-1)], duration_s=120).requests_per_s == 0.1
    )
    with pytest.raises(ConfigError, match="earlier"):
        derived(tmp_path, records, duration_s=600)


def test_a_few_endless_prompts_leave_no_percentile_below_the_mean(tmp_path: Path) -> None:
    records = [*minutes(99), a_record(61.0, input_tokens=1_000_000)]
    found = derived(tmp_path, records).input_tokens

    assert found.mean > 10_000
    assert found.p95 is None


@pytest.mark.parametrize(
    ("records", "wish", "told"),
    [
        (minutes(9), {}, "t.jsonl: its requests come within 52.4444 s, and rates are taken of min"),
        (minutes(9, 9), {"start_s": 500}, "t.jsonl: no request from second 500 on; give another"),
        (
            minutes(9, 9, model="chat"),
            {"model": "chta"},
            "t.jsonl: model: no request has 'chta'; did you mean 'chat'?",
        ),
        (minutes(9, 9), {"model": "chat"}, "no request has 'chat'; it names none: leave `model` o"),
        (minutes(9, 9, output_tokens=0), {}, "t.jsonl: output_tokens: all are 0; give a trace of"),
    ],
)
def test_a_trace_that_tells_no_demand_is_refused(
    tmp_path: Path, records: Records, wish: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        derived(tmp_path, records, **wish)
    assert told in str(caught.value)
