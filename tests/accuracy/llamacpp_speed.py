"""Public generation speeds of llama.cpp, one request at a time, beside ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from placement.catalogue import Checkpoint
from placement.fit_request import make_request
from placement.fitted import LLAMACPP, LlamaConstants
from placement.gguf_weights import weights_by_arithmetic
from placement.llamacpp import LlamaTask, place
from placement.llamacpp_speed import predict_llamacpp
from tests.accuracy.cases import gpu_of, model_of
from tests.accuracy.other_gpus import KINDS, SPEED, Speed
from tests.accuracy.rows import Row, read_rows

_CONTEXT = 512  # tokens: the benchmarks generate on a short prompt
_BANDWIDTH_GB_S = 90.0


@cache
def read_llamacpp_speeds(constants: LlamaConstants = LLAMACPP) -> tuple[Speed, ...]:
    rows = read_rows(SPEED, KINDS)
    return tuple(_speed(row, constants) for row in rows if row.engine == "llama.cpp")


def fit_llamacpp() -> LlamaConstants:
    """Least squares of relative errors: seconds = rest + bytes' part / share + layers' part x time."""
    rest = _seconds(LlamaConstants(1e9, 0.0))
    by_bytes = _seconds(LlamaConstants(1.0, 0.0)) - rest
    by_layers = _seconds(LlamaConstants(1e9, 1.0)) - rest
    measured = np.array([1 / each.row.value for each in read_llamacpp_speeds()])
    parts = np.stack([by_bytes / measured, by_layers / measured], axis=1)
    (inverse, layer_s), *_ = np.linalg.lstsq(parts, 1 - rest / measured, rcond=None)
    return LlamaConstants(gpu_bandwidth=float(1 / inverse), layer_s=float(layer_s))


def llamacpp_error(constants: LlamaConstants) -> float:
    """Mean absolute relative error of the speed."""
    return fmean(abs(each.error) for each in read_llamacpp_speeds(constants))


def _seconds(constants: LlamaConstants) -> NDArray[np.float64]:
    return np.array([1 / each.predicted for each in read_llamacpp_speeds(constants)])


def llamacpp_report() -> Iterator[str]:
    """One line a row."""
    yield "\nllama.cpp, one request: row, measured tokens/s, ours, error"
    for each in read_llamacpp_speeds():
        yield (
            f"  {each.row.label:<44} {each.row.value:>7.1f} {each.predicted:>7.1f} "
            f"{each.error:>+7.1%}"
        )


def _speed(row: Row, constants: LlamaConstants) -> Speed:
    model, gpu = model_of(row), gpu_of(row)
    weights = weights_by_arithmetic(model.architecture, _checkpoint(row))
    task = LlamaTask(architecture=model.architecture, weights=weights, context=_CONTEXT)
    placement = place(task, memory_bytes=gpu.memory_bytes or 0, num_gpus=row.n_gpus or 1)
    assert placement is not None
    told = re.search(r"(\d+) layers on GPU", row.note)
    if told is not None:  # whole layers by hand, where we would leave experts alone at home
        placement = replace(placement, layers=(int(told[1]),), cpu_moe_layers=0)
    request = make_request(
        f"{gpu.name}:{row.n_gpus}",
        input_tokens=1,
        output_tokens=128,
        host_bandwidth_gb_s=_BANDWIDTH_GB_S,
    )
    prediction = predict_llamacpp(task, placement, gpu, request, constants=constants)
    return Speed(row, "generated tokens/s", 1000 / prediction.tpot_ms)


def _checkpoint(row: Row) -> Checkpoint:
    precision = row.precision.lower().replace("f16", "fp16")
    return Checkpoint.model_validate({"precision": precision, "source": "x", "format": "gguf"})
