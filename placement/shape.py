"""From a legal candidate to the Shape that a plan shows: memory, KV cache, speed, flags."""

from __future__ import annotations

from placement.candidate import Candidate
from placement.engine_args import engine_args, engine_environment
from placement.memory import kv_layout, memory_use
from placement.notes import shape_notes
from placement.performance import Load, predict, replica_speed
from placement.plan import Shape

ONE_REQUEST = Load(concurrency=1, input_tokens=512, output_tokens=128)


def make_shape(
    candidate: Candidate, *, load: Load = ONE_REQUEST, extra_args: tuple[str, ...] = ()
) -> Shape:
    """Everything that follows from a candidate; `load` is what the prediction is made for."""
    use = memory_use(candidate)
    layout = kv_layout(candidate, use.stages[use.worst_stage].stage)
    return Shape(
        engine=candidate.engine,
        precision=candidate.checkpoint.precision,
        dtype=candidate.dtype,
        tensor_parallel_size=candidate.tensor_parallel_size,
        pipeline_parallel_size=candidate.pipeline_parallel_size,
        data_parallel_size=candidate.data_parallel_size,
        decode_context_parallel_size=candidate.decode_context_parallel_size,
        num_nodes=candidate.num_nodes,
        layer_partition=candidate.layer_partition,
        expert_parallel=candidate.expert_parallel,
        max_model_len=candidate.max_model_len,
        max_num_seqs=candidate.max_num_seqs,
        max_num_batched_tokens=candidate.max_num_batched_tokens,
        gpu_memory_utilization=candidate.gpu_memory_utilization,
        kv_cache_dtype=candidate.kv_cache_dtype,
        per_gpu=use.per_gpu,
        kv_bytes_per_token=layout.bytes_per_context_token,
        kv_cache_tokens=use.kv.tokens,
        max_concurrency=use.kv.max_concurrency,
        num_layers=candidate.architecture.num_layers,
        prediction=predict(replica_speed(candidate), load),
        engine_args=engine_args(candidate, extra_args),
        engine_environment=engine_environment(candidate),
        notes=shape_notes(candidate),
    )
