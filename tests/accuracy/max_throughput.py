"""TensorRT-LLM's published highest throughputs, beside ours for vLLM at its best concurrency.

Another engine, at a concurrency that is not told: no promise is made on these, but an order of
magnitude can be seen, and what pipelines and mixtures do at hundreds of requests at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from placement.candidate import Candidate, simulated_device
from placement.catalogue import Checkpoint
from placement.performance import Load, predict, replica_speed
from tests.accuracy.cases import gpu_of, model_of
from tests.accuracy.other_gpus import KINDS, SPEED, Speed
from tests.accuracy.rows import Row, read_rows

_CONCURRENCIES = (64, 128, 256, 512, 1024, 2048)
_PRECISIONS = {"FP4": "nvfp4", "FP8": "fp8"}


@cache
def read_throughputs() -> tuple[Speed, ...]:
    return tuple(_speed(row) for row in read_rows(SPEED, KINDS) if row.unit == "output tok/s")


def max_throughput_report() -> Iterator[str]:
    """One line a row."""
    yield "\nhighest throughput, TensorRT-LLM as published and ours for vLLM: tokens/s, error"
    for each in read_throughputs():
        yield (
            f"  {each.row.label:<46} {each.row.lengths:>9} {each.row.value:>7,.0f} "
            f"{each.predicted:>7,.0f} {each.error:>+6.0%}"
        )


def _speed(row: Row) -> Speed:
    return Speed(row, "output tokens/s", max(_throughput(row, each) for each in _CONCURRENCIES))


def _throughput(row: Row, concurrency: int) -> float:
    inputs, _, outputs = row.lengths.partition("/")
    load = Load(concurrency, float(inputs), float(outputs))
    candidate = Candidate(
        model=model_of(row),
        checkpoint=Checkpoint.model_validate(
            {"precision": _PRECISIONS[row.precision], "source": row.source}
        ),
        device=simulated_device(gpu_of(row)),
        tensor_parallel_size=row.tensor_parallel_size,
        pipeline_parallel_size=row.pipeline_parallel_size,
        max_model_len=int(load.input_tokens + load.output_tokens),
        max_num_seqs=concurrency,
        max_num_batched_tokens=8192,
        kv_cache_dtype="fp8",
    )
    return predict(replica_speed(candidate), load).output_tokens_per_s
