"""Runs on other GPUs, of other models, with old releases of vLLM: nothing was fitted to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

from placement.fitted import FITTED, Constants
from placement.performance import Load, predict, prefill_s, replica_speed
from tests.accuracy.cases import case_of
from tests.accuracy.rows import Row, read_rows

SPEED = Path(__file__).with_name("speed.csv")
KINDS = ("latency", "throughput")
_LENGTHS = (32.0, 128.0)  # France-Travail's requests, and vLLM's own latency benchmark


@dataclass(frozen=True, slots=True)
class Speed:
    """A measured speed beside ours."""

    row: Row
    quantity: str
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.row.value - 1


@cache
def read_speeds(constants: Constants = FITTED) -> tuple[Speed, ...]:
    rows = read_rows(SPEED, KINDS)
    return tuple(_speed(row, constants) for row in rows if row.engine.startswith("vLLM"))


def other_gpus_report() -> Iterator[str]:
    """Mean errors by GPU and number of requests, then the worst."""
    speeds = read_speeds()
    yield (
        "\nother GPUs, models and releases (vLLM 0.4 to 0.9, bf16 but for one; nothing fitted):"
        " runs, mean and mean absolute error"
    )
    for quantity in sorted({each.quantity for each in speeds}):
        for gpu in sorted({each.row.gpu for each in speeds if each.quantity == quantity}):
            members = [each for each in speeds if (each.quantity, each.row.gpu) == (quantity, gpu)]
            yield f"  {quantity:<34} {gpu:<8} {len(members):>3} {spread(members)}"


def spread(speeds: Sequence[Speed]) -> str:
    errors = [each.error for each in speeds]
    return f"{mean(errors):>+7.1%} {mean(map(abs, errors)):>6.1%}"


def _speed(row: Row, constants: Constants) -> Speed:
    speed = replica_speed(case_of(row).candidate, constants=constants)
    concurrency = float(row.batch or 1)
    if row.unit == "prompt tok/s":
        tokens = 2048.0
        return Speed(row, "prompt tokens/s", tokens / prefill_s(speed, tokens))
    if row.unit == "ms TTFT":
        alone = Load(1, float(row.context or 1024), _LENGTHS[1])
        return Speed(row, "TTFT", predict(speed, alone).ttft_s * 1000)
    prediction = predict(speed, Load(concurrency, *_LENGTHS))
    duration = prediction.ttft_s + (_LENGTHS[1] - 1) * prediction.tpot_ms / 1000
    if row.unit == "ms end to end":
        return Speed(row, "time of a request", duration * 1000)
    return Speed(row, f"tokens/s of one of {concurrency:.0f} requests", _LENGTHS[1] / duration)
