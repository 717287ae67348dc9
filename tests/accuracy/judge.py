"""What placement says about each row, and what three other calculators say."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from placement.candidate import GIB
from placement.kv_cache import kv_cache
from placement.legality import first_rejection
from placement.memory import activation_bytes, kv_layout, memory_use, stages_of
from placement.parameters import count_parameters
from placement.vllm_release import DEFAULT_RELEASE, release
from placement.weight_bytes import checkpoint_bytes, weights_bytes
from tests.accuracy.baselines import BASELINES
from tests.accuracy.cases import Case, Excluded, case_of, checkpoint_of, gpu_of, model_of
from tests.accuracy.rows import Row

QUANTITIES = (
    *("parameters", "checkpoint", "torch total", "weights", "KV cache"),
    *("activation", "non-torch", "CUDA graphs", "fits"),
)
OURS_BY_DEFAULT = f"ours as {DEFAULT_RELEASE}"
_VENDOR = ("GB minimum VRAM", "GB minimum GPU RAM")


@dataclass(frozen=True, slots=True)
class Judged:
    """A row with our answer in its unit, or the reason why there is none."""

    row: Row
    quantity: str = ""
    predicted: float = 0.0
    measured: float = 0.0
    excluded: str = ""
    loose: str = ""  # why the row binds no threshold
    others: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Relative; 0 when both are 0."""
        if self.measured == self.predicted:
            return 0.0
        return self.predicted / self.measured - 1 if self.measured else float("inf")


def judge(row: Row) -> Judged:
    """Our answer to one row."""
    try:
        return _answer(row)
    except Excluded as reason:
        return Judged(row, excluded=str(reason))


def _answer(row: Row) -> Judged:
    if row.kind == "params":
        parameters = count_parameters(model_of(row).architecture)
        predicted = parameters.language if "(text)" in row.model else parameters.total
        loose = "" if "exact" in row.note else "published rounded"
        return Judged(row, "parameters", predicted, row.value, loose=loose)
    if row.kind == "size":
        model = model_of(row)
        size = checkpoint_bytes(model.architecture, checkpoint_of(row, model))
        scale = {"GB": 1e9, "GiB": GIB}.get(row.unit, 1)
        loose = "published as a span" if re.match(r"\d+-\d+ G", row.note) else ""
        return Judged(row, "checkpoint", size / scale, row.value, loose=loose)
    if row.unit == "bytes torch total":
        return Judged(row, "torch total", gpu_of(row).memory_bytes or 0, row.value)
    if row.unit in _VENDOR:
        raise Excluded(f"a vendor's figure ({row.unit}), weights or weights and context by turns")
    if row.kind == "fit":
        return _fit(row)
    return _memory(row, case_of(row)) if row.kind == "memory" else _cache(row, case_of(row))


def _memory(row: Row, case: Case) -> Judged:
    candidate = case.candidate
    constants = release(candidate.vllm_release)
    stage = stages_of(candidate)[0 if "first stage" in row.note else -1]
    if row.note.startswith("activation"):
        return Judged(row, "activation", activation_bytes(candidate, stage) / GIB, row.value)
    if row.note.startswith("non-torch"):
        non_torch = constants.non_torch_bytes(
            num_stages=candidate.pipeline_parallel_size,
            ranks_per_stage=candidate.tensor_parallel_size,
        )
        return Judged(row, "non-torch", non_torch / GIB, row.value)
    if row.unit == "GiB CUDA graphs":
        return Judged(row, "CUDA graphs", constants.cuda_graph_gib, row.value)
    if row.unit not in ("GiB", "GiB load", "GB load/rank"):
        raise Excluded(f"{row.unit} of another kind of program")
    # vLLM 0.5 wrote GB and meant GiB.
    return Judged(row, "weights", weights_bytes(candidate, stage) / GIB, row.value)


def _cache(row: Row, case: Case) -> Judged:
    if "rounded" in row.unit:
        raise Excluded("rounded to 25k, and vLLM 0.4-0.8 profiles a max_model_len that is not told")
    if row.unit not in ("GiB", "GiB KV", "KV tokens"):
        raise Excluded(f"{row.unit}: a ratio")
    if "only consistent with util 0.95" in row.note:
        raise Excluded("the source says util 0.9, its numbers only add up with 0.95")
    given = row.told(r"(?:^|\s)(\d+\.\d+) GiB(?: per rank|; )")
    if "GPU" in case.untold and given is not None:
        return _cache_of_bytes(row, case, float(given))
    if case.untold:
        raise Excluded(f"{' and '.join(case.untold)} not told")
    candidate = case.candidate
    use = memory_use(candidate)
    in_bytes = row.unit != "KV tokens"
    predicted = use.per_gpu.kv_cache_bytes / GIB if in_bytes else use.kv.tokens
    others = {
        name: baseline.kv_bytes(candidate) / GIB if in_bytes else baseline.kv_tokens(candidate)
        for name, baseline in BASELINES.items()
    }
    unasked = memory_use(replace(candidate, vllm_release=DEFAULT_RELEASE))
    others[OURS_BY_DEFAULT] = (
        unasked.per_gpu.kv_cache_bytes / GIB if in_bytes else unasked.kv.tokens
    )
    return Judged(row, "KV cache", predicted, row.value, others=others)


def _cache_of_bytes(row: Row, case: Case, gib: float) -> Judged:
    """The row tells the bytes, not where they come from: this asks for the layout only."""
    cache = kv_cache(
        kv_layout(case.candidate),
        available_bytes=int(gib * GIB),
        max_model_len=case.candidate.max_model_len,
    )
    return Judged(row, "KV cache", cache.tokens, row.value, loose="from bytes that the row tells")


def _fit(row: Row) -> Judged:
    if row.unit == "claimed fits(0/1)":
        raise Excluded("a claim that its own vendor's recipe contradicts (119 GB on 80)")
    if row.unit == "GPU layers of 40":
        raise Excluded("a calculator's answer: see tests/accuracy/test_prositronic.py")
    case = case_of(row)
    candidate = replace(case.candidate, expert_parallel=case.candidate.architecture.moe is not None)
    fits = first_rejection(candidate) is None
    measured = 0.0 if "fails" in row.unit else row.value
    others = {name: float(each.fits(candidate)) for name, each in BASELINES.items()}
    return Judged(row, "fits", float(fits), measured, others=others)
