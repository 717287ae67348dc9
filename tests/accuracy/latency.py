"""Measured time to first token and time per token, against the performance model.

Its constants were fitted to Llama-70B on H100 alone: every other group is held out.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from placement.candidate import Candidate, simulated_device
from placement.catalogue import Checkpoint
from placement.efficiency import Collective
from placement.performance import Load, ReplicaSpeed, predict, replica_speed
from tests.accuracy.architectures import other_model
from tests.accuracy.cases import CATALOGUE

LATENCY = Path(__file__).with_name("latency.csv")
_MODELS = {
    "nvidia/Llama-3.1-8B-Instruct-FP8": ("llama-3.1-8b", "fp8"),
    "meta-llama/Llama-3.1-70B": ("llama-3.1-70b", "fp8"),
    "openai/gpt-oss-120b": ("gpt-oss-120b", "mxfp4"),
    "MiniMaxAI/MiniMax-M2.5": ("minimax-m2.5", "fp8"),
    "deepseek-ai/DeepSeek-R1": ("deepseek-v3", "fp8"),
}
_GPUS = {"h100_sxm": "H100-SXM", "h200_sxm": "H200-SXM"}
_REACHABLE = 0.8  # of the data sheet, in bandwidth and FLOPS at once


@dataclass(frozen=True, slots=True)
class Run:
    """A measured run with the model's answer, or why there is none."""

    group: str
    label: str
    ttft_s: float
    tpot_ms: float
    predicted_ttft_s: float = 0.0
    predicted_tpot_ms: float = 0.0
    excluded: str = ""

    @property
    def ttft_error(self) -> float:
        return self.predicted_ttft_s / self.ttft_s - 1

    @property
    def tpot_error(self) -> float:
        return self.predicted_tpot_ms / self.tpot_ms - 1


def read_runs(path: Path = LATENCY) -> list[Run]:
    """All rows."""
    with path.open(encoding="utf-8", newline="") as handle:
        return [_run(cell) for cell in csv.DictReader(handle)]


def latency_report(runs: Sequence[Run]) -> Iterator[str]:
    """One line a group, the order of configurations, and what was left out."""
    yield "\nspeed: group, runs, TPOT mean and mean absolute error, TTFT median and median absolute"
    kept = [run for run in runs if not run.excluded]
    for group in sorted({run.group for run in kept}):
        members = [run for run in kept if run.group == group]
        yield f"  {group:<38} {len(members):>3}  {_errors(members)}"
    yield f"  {'all':<38} {len(kept):>3}  {_errors(kept)}"
    share, pairs = order_kept(kept)
    yield f"  order of TPOT right in {share:.1%} of {pairs:,} pairs that differ by more than 10 %"
    reasons = sorted({run.excluded for run in runs if run.excluded})
    for reason in reasons:
        left_out = [run for run in runs if run.excluded == reason]
        yield f"  left out, {len(left_out)} runs: {reason}"
        yield f"    {'; '.join(run.label for run in left_out)}"


def order_kept(runs: Sequence[Run]) -> tuple[float, int]:
    """Share of pairs of a model whose TPOT differs by more than 10% that are in the right order."""
    right = total = 0
    for index, one in enumerate(runs):
        for other in runs[index + 1 :]:
            apart = abs(one.tpot_ms / other.tpot_ms - 1) > 0.1
            if one.group.split()[0] != other.group.split()[0] or not apart:
                continue
            total += 1
            slower = one.tpot_ms > other.tpot_ms
            right += slower == (one.predicted_tpot_ms > other.predicted_tpot_ms)
    return right / max(total, 1), total


def _errors(runs: Sequence[Run]) -> str:
    tpot = [run.tpot_error for run in runs]
    ttft = [run.ttft_error for run in runs]
    return (
        f"{mean(tpot):>+7.1%} {mean(map(abs, tpot)):>6.1%}   "
        f"{median(ttft):>+7.1%} {median(map(abs, ttft)):>6.1%}"
    )


def _run(cell: dict[str, str]) -> Run:
    name, precision = _MODELS[cell["model_path"]]
    model = other_model(name)
    assert model is not None
    copies = int(cell["attention_dp_size"] or 1)
    candidate = Candidate(
        model=model,
        checkpoint=Checkpoint.model_validate({"precision": precision, "source": "x"}),
        device=simulated_device(CATALOGUE.gpu(_GPUS[cell["system"]])),
        tensor_parallel_size=int(cell["tp_size"]),
        data_parallel_size=copies,
        expert_parallel=int(cell["moe_ep_size"] or 1) > 1,
        max_num_seqs=1024,
        gpu_memory_utilization=0.9,
        max_model_len=int(cell["isl"]) + int(cell["osl"]),
        kv_cache_dtype="fp8" if cell["model_path"].startswith("nvidia/") else "auto",
        vllm_release="0.12",
    )
    load = Load(int(cell["batch_size"]) * copies, float(cell["isl"]), float(cell["osl"]))
    ttft, tpot = float(cell["silicon_ttft_ms"]) / 1000, float(cell["silicon_tpot_ms"])
    group = f"{name} {cell['system']} {cell['backend']} TP{cell['tp_size']}"
    label = f"{name} TP{cell['tp_size']} {cell['isl']}/{cell['osl']} x{cell['batch_size']}"
    speed = replica_speed(candidate)
    excluded = ""
    if copies > 1:
        excluded = "16 GPUs on two nodes, whose network is not told"
    elif predict(_data_sheet(speed), load).tpot_ms > _REACHABLE * tpot:
        excluded = (
            f"faster than {_REACHABLE:.0%} of the data sheet allows: cached prompts, shorter answers "
            "or fewer requests than told"
        )
    predicted = predict(speed, load)
    return Run(group, label, ttft, tpot, predicted.ttft_s, predicted.tpot_ms, excluded)


def _data_sheet(speed: ReplicaSpeed) -> ReplicaSpeed:
    """The same replica if nothing were lost."""
    ideal = replace(
        speed.efficiency,
        bandwidth=1.0,
        flops=1.0,
        step_s=0.0,
        layer_s=0.0,
        expert_layer_s=0.0,
        request_s=0.0,
    )
    return replace(speed, efficiency=ideal, all_reduce=Collective())
