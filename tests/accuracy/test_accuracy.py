"""The thresholds that the estimator promises, on every row that tells its configuration."""

from __future__ import annotations

import pytest

from placement.candidate import GIB
from placement.parameters import count_parameters
from tests.accuracy.architectures import CONFIGS, PARAMETERS, other_model
from tests.accuracy.cases import gpu_of
from tests.accuracy.judge import OURS_BY_DEFAULT, Judged, judge
from tests.accuracy.report import quantile, report
from tests.accuracy.rows import read_rows

JUDGED = [judge(row) for row in read_rows()]
SMALL_GPU_BYTES = 40 * 10**9


def rows_of(quantity: str) -> list[Judged]:
    return [each for each in JUDGED if each.quantity == quantity and not each.loose]


def each_of(quantity: str) -> pytest.MarkDecorator:
    rows = rows_of(quantity)
    ids = [f"{each.row.line}-{each.row.label}" for each in rows]
    return pytest.mark.parametrize("judged", rows, ids=ids)


@each_of("parameters")
def test_parameters_are_exact_where_a_file_tells(judged: Judged) -> None:
    assert judged.predicted == judged.measured


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_of_other_vendors_models_are_exact(name: str) -> None:
    model = other_model(name)

    assert model is not None
    assert count_parameters(model.architecture).total == PARAMETERS[name]


@each_of("checkpoint")
def test_checkpoint_bytes_are_within_one_percent_by_arithmetic(judged: Judged) -> None:
    assert abs(judged.error) <= 0.01


@each_of("weights")
def test_weights_of_a_rank_are_within_two_percent(judged: Judged) -> None:
    assert abs(judged.error) <= 0.02


@each_of("KV cache")
def test_kv_cache_is_within_three_percent_or_ten_on_small_cards(judged: Judged) -> None:
    small = (gpu_of(judged.row).memory_bytes or 0) < SMALL_GPU_BYTES

    assert abs(judged.error) <= (0.10 if small else 0.03)


@each_of("fits")
def test_every_clear_verdict_is_right(judged: Judged) -> None:
    assert judged.predicted == judged.measured


@each_of("torch total")
def test_the_memory_of_a_gpu_is_what_torch_sees(judged: Judged) -> None:
    assert judged.predicted == judged.measured


def test_no_other_calculator_comes_as_close() -> None:
    caches = [each for each in rows_of("KV cache") if each.others]
    ours = quantile([abs(each.error) for each in caches], 0.9)
    names = set(caches[0].others) - {OURS_BY_DEFAULT}

    for name in names:
        theirs = quantile([abs(each.others[name] / each.measured - 1) for each in caches], 0.9)
        assert ours < theirs / 2, name


def test_nothing_predicted_is_more_than_the_gpu_has() -> None:
    for each in rows_of("KV cache"):
        if each.row.unit == "GiB":
            assert each.predicted * GIB < (gpu_of(each.row).memory_bytes or 0)


def test_what_is_left_out_is_printed_with_its_reason() -> None:
    text = "\n".join(report(JUDGED))

    for each in JUDGED:
        assert not each.excluded or each.excluded in text


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_configuration_is_understood(name: str) -> None:
    assert other_model(name) is not None
