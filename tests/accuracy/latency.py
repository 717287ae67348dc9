"""Measured time to first token and time per token: the runs, and which of them are left out.

The runs are InferenceMAX's, from AIConfigurator's table (`latency.csv`), but for those of Llama-8B.
What its public scripts say and the table does not: lengths are drawn evenly from 80% to 100% of
those told; ten requests for each slot, all slots filled at once; `--max-num-seqs` is the
concurrency, 8,192 tokens a step, no prefix cache, 90% of the memory, a context of 10,240; under
SGLang 32,768 tokens a step, and ten tokens in a chunk of the stream, the first one too. Times are
means over the requests.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from placement.candidate import Candidate, simulated_device
from placement.catalogue import Checkpoint
from placement.costs import Collective
from placement.fitted import FITTED, Constants
from placement.performance import Load, ReplicaSpeed, predict
from placement.plan import Prediction
from placement.replica_speed import replica_speed, with_constants
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
_MEAN_LENGTH = 0.9  # of the length that is told
_SGLANG_CHUNK = 10  # tokens; the first arrives with nine others
_REACHABLE = 0.8  # of the data sheet, in bandwidth and FLOPS at once
_SPOILT = (
    1 / 3
)  # of a model's runs on one engine version: then the rest is not what it is said to be


@dataclass(frozen=True, slots=True)
class Run:
    """A measured run."""

    model: str
    gpu: str
    engine: str
    version: str
    told: Load
    candidate: Candidate
    speed: ReplicaSpeed
    load: Load  # as it was in truth
    ttft_s: float
    tpot_ms: float
    excluded: str = ""

    @property
    def group(self) -> str:
        ranks = self.candidate.tensor_parallel_size
        return f"{self.model} {self.gpu} {self.engine} TP{ranks}"

    @property
    def label(self) -> str:
        told = self.told
        lengths = f"{told.input_tokens:.0f}/{told.output_tokens:.0f}"
        return f"TP{self.candidate.tensor_parallel_size} {lengths} x{told.concurrency:.0f}"

    def predicted(self, constants: Constants = FITTED) -> Prediction:
        """Of this run, as its client saw it."""
        speed = self.speed
        if constants is not FITTED:
            speed = with_constants(speed, self.candidate, constants)
        return seen_by_client(self, predict(speed, self.load))


def seen_by_client(run: Run, prediction: Prediction) -> Prediction:
    """The prediction, with the tokens that SGLang keeps back."""
    if run.engine != "sglang":
        return prediction
    kept_back = (_SGLANG_CHUNK - 1) * prediction.tpot_ms / 1000
    return prediction.model_copy(update={"ttft_s": prediction.ttft_s + kept_back})


@cache
def read_runs(path: Path = LATENCY) -> tuple[Run, ...]:
    """All rows, but those that repeat another row's measurement."""
    with path.open(encoding="utf-8", newline="") as handle:
        runs = [_run(cell) for cell in csv.DictReader(handle)]
    distinct = {
        (run.group, run.told, round(run.tpot_ms, 2), round(run.ttft_s, 3)): run for run in runs
    }
    return tuple(_without_the_unusable(list(distinct.values())))


def kept(runs: Sequence[Run]) -> list[Run]:
    """The runs that count."""
    return [run for run in runs if not run.excluded]


def _without_the_unusable(runs: list[Run]) -> Iterator[Run]:
    impossible = [run for run in runs if _is_impossible(run)]
    for run in runs:
        same = [each for each in runs if _setup(each) == _setup(run)]
        spoilt = [each for each in same if each in impossible]
        if len(spoilt) > _SPOILT * len(same):
            yield replace(run, excluded=_why_spoilt(run, len(spoilt), len(same)))
        elif run in impossible:
            yield replace(run, excluded=f"faster than {_REACHABLE:.0%} of the data sheet allows")
        else:
            yield replace(run, excluded=_why_disturbed(run, runs))


def _why_spoilt(run: Run, spoilt: int, same: int) -> str:
    version = run.version or "of unknown version"
    counts = (
        f"{run.model}, {run.engine} {version}: {spoilt} of {same} runs are faster than "
        f"{_REACHABLE:.0%} of the data sheet allows, so that their load is not as told"
    )
    if run.model == "llama-3.1-8b":
        return f"{counts}: prompts from the prefix cache, see below"
    return (
        f"{counts}: of 512 requests at once a few had slots (TPOT is that of 4 to 64 at once, TTFT "
        "4 times a request, as of ten requests a slot that all came at once)"
    )


def _why_disturbed(run: Run, runs: Sequence[Run]) -> str:
    """Slower than the same engine under more load, or than its own repetition."""
    for other in runs:
        same = (other.group, other.version, other.told.input_tokens, other.told.output_tokens)
        if same != (run.group, run.version, run.told.input_tokens, run.told.output_tokens):
            continue
        heavier = other.told.concurrency > run.told.concurrency
        if heavier and run.tpot_ms > 1.05 * other.tpot_ms:
            return (
                "disturbed: 5 % slower, and more, than the same engine with more requests at once"
            )
        if other.told.concurrency == run.told.concurrency and run.tpot_ms > 1.1 * other.tpot_ms:
            return "disturbed: 10 % slower, and more, than its own repetition"
    return ""


def _setup(run: Run) -> tuple[str, str, str, str]:
    return (run.model, run.gpu, run.engine, run.version)


def _is_impossible(run: Run) -> bool:
    return predict(without_losses(run.speed), run.load).tpot_ms > _REACHABLE * run.tpot_ms


def _run(cell: dict[str, str]) -> Run:
    model, precision = _MODELS[cell["model_path"]]
    known = other_model(model)
    assert known is not None
    # MiniMax's rows of `attention_dp_size` 4 are called c4_tp4_ep4 as the others are, with the batch
    # of a fourth; 13 of 15 have the others' TPOT within 2 %: four GPUs, not sixteen.
    told = Load(
        int(cell["batch_size"]) * int(cell["attention_dp_size"] or 1),
        float(cell["isl"]),
        float(cell["osl"]),
    )
    inference_max = model != "llama-3.1-8b"
    sglang = cell["backend"] == "sglang"
    candidate = Candidate(
        model=known,
        checkpoint=Checkpoint.model_validate({"precision": precision, "source": "x"}),
        device=simulated_device(CATALOGUE.gpu(_GPUS[cell["system"]])),
        tensor_parallel_size=int(cell["tp_size"]),
        expert_parallel=int(cell["moe_ep_size"] or 1) > 1,
        max_num_seqs=256 if sglang else int(told.concurrency),
        max_num_batched_tokens=32768 if sglang else 8192,
        gpu_memory_utilization=0.9,
        max_model_len=10240,
        kv_cache_dtype="auto" if inference_max else "fp8",
        vllm_release="0.18" if cell["backend_version"].startswith("0.18") else "0.10",
    )
    share = _MEAN_LENGTH if inference_max else 1.0
    return Run(
        model=model,
        gpu=_GPUS[cell["system"]],
        engine=cell["backend"],
        version=cell["backend_version"],
        told=told,
        candidate=candidate,
        speed=replica_speed(candidate),
        load=Load(told.concurrency, told.input_tokens * share, told.output_tokens * share),
        ttft_s=float(cell["silicon_ttft_ms"]) / 1000,
        tpot_ms=float(cell["silicon_tpot_ms"]),
    )


def without_losses(speed: ReplicaSpeed) -> ReplicaSpeed:
    """The same replica if it reached its data sheet and nothing beside cost time."""
    ideal = replace(
        speed.efficiency,
        bandwidth=1.0,
        expert_bandwidth=1.0,
        kv_bandwidth=1.0,
        flops=1.0,
        expert_flops=speed.flops / speed.flops_16_bit,
        attention_flops=1.0,
        step_s=0.0,
        kernel_s=0.0,
        sequence_s=0.0,
        request_s=0.0,
        routing_evenness=1.0,
        together=0.0,
    )
    return replace(
        speed, efficiency=ideal, all_reduce=Collective(), small_messages=0, expert_spread=0.0
    )
