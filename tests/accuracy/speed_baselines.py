"""Other people's formulas for the same runs, as far as public figures allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from placement.costs import Collective
from placement.performance import ReplicaSpeed, predict, prefill_s, prefill_work_s, room, step_s
from placement.plan import Prediction
from tests.accuracy.latency import Run, without_losses

# Kernel tables of H100 and H200 (PLANNING.md): weights read in FP8 and in 16 bits, peak FLOPs, MoE
# weights read with evenly chosen experts, all-reduces of vLLM's kernel and of NCCL, by ranks.
_READ = {"fp8": 0.67, "mxfp4": 0.82}
_FLOPS = {"fp8": 0.66, "mxfp4": 0.79}
_EXPERTS_READ, _EXPERTS_FLOPS = 0.85, 0.4
_EXPERTS_S = 40e-6  # of a layer of experts, at least
_KV_READ = 0.8
_CUSTOM_S = {2: 4.4e-6, 4: 4.8e-6, 8: 5.3e-6}
_NCCL_S = {2: 6e-6, 4: 9.5e-6, 8: 16e-6}
_MOST_WAIT, _FIRST_WAIT = 4.0, 2.0


def roofline(run: Run) -> Prediction:
    """The data sheet: bytes or FLOPs, whichever takes longer; no other request in the way."""
    speed = _speed(run, without_losses(run.speed), Collective())
    context = run.load.input_tokens + run.load.output_tokens / 2
    running = min(run.load.concurrency, room(speed, context))
    return _prediction(
        ttft_s=prefill_s(speed, run.load.input_tokens),
        tpot_s=step_s(speed, concurrency=running, context=context),
    )


def aiconfigurator(run: Run) -> Prediction:
    """Kernels one after the other, and `run_agg`'s mean-field steps (aiconfigurator sdk/backends).

    A run of output tokens has ceil(input x batch / tokens of a step) steps in which prompts are
    mixed with decoding, three fewer for TPOT; TTFT is a mixed step, times a wait that grows with
    their number up to four. Its kernel database, which also knows the least time of each kernel, is
    replaced by the shares that PLANNING.md read from it, so that it does worse than it would.
    """
    speed = _speed(run, _kernel_table(run), Collective(_CUSTOM_S[_ranks(run)], _per_byte(run)))
    load, budget = run.load, run.candidate.max_num_batched_tokens
    context = load.input_tokens + load.output_tokens / 2
    batch = min(load.concurrency, room(speed, context))
    together = math.ceil(load.input_tokens * batch / budget)
    decode = step_s(speed, concurrency=batch, context=context)
    prompts = min(budget, load.input_tokens * batch)
    mixed = prefill_work_s(speed, load.input_tokens) * prompts / load.input_tokens + decode
    slowed = max(1, together - 3)
    tpot = (mixed * slowed + decode * (load.output_tokens - slowed)) / load.output_tokens
    wait = min(_FIRST_WAIT + (together - 3) / 20, _MOST_WAIT)
    chunks = math.ceil(load.input_tokens / budget)
    return _prediction(ttft_s=mixed * chunks * wait, tpot_s=tpot)


def vidur(run: Run) -> Prediction | None:
    """Profiled kernels and NCCL under a vLLM-like scheduler, no cost of the host; dense models only.

    Its profiles are replaced by the same shares, its simulated scheduler by our closed loop.
    """
    if run.speed.architecture.moe is not None:
        return None
    speed = _speed(run, _kernel_table(run), Collective(_NCCL_S[_ranks(run)], _per_byte(run)))
    together = replace(speed.efficiency, together=run.speed.efficiency.together)
    return predict(replace(speed, efficiency=together), run.load)


SPEED_BASELINES: Mapping[str, Callable[[Run], Prediction | None]] = {
    "roofline": roofline,
    "AIConfigurator": aiconfigurator,
    "Vidur": vidur,
}


def _prediction(*, ttft_s: float, tpot_s: float) -> Prediction:
    return Prediction(ttft_s=ttft_s, tpot_ms=tpot_s * 1000, output_tokens_per_s=0.0)


def _ranks(run: Run) -> int:
    return run.candidate.tensor_parallel_size


def _per_byte(run: Run) -> float:
    return run.speed.all_reduce.s_per_byte


def _speed(run: Run, speed: ReplicaSpeed, collective: Collective) -> ReplicaSpeed:
    alone = _ranks(run) == 1
    return replace(speed, all_reduce=Collective() if alone else collective)


def _kernel_table(run: Run) -> ReplicaSpeed:
    speed = without_losses(run.speed)
    precision, moe = run.candidate.checkpoint.precision, speed.architecture.moe
    sparse = 0 if moe is None else speed.architecture.num_layers - moe.num_dense_layers
    shares = replace(
        speed.efficiency,
        bandwidth=_READ[precision],
        expert_bandwidth=_EXPERTS_READ,
        kv_bandwidth=_KV_READ,
        flops=_FLOPS[precision],
        expert_flops=_EXPERTS_FLOPS * speed.efficiency.expert_flops,
        attention_flops=0.6,
        step_s=sparse * _EXPERTS_S,
    )
    return replace(speed, efficiency=shares)
