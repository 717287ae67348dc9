"""What vLLM's log and metrics tell; the simulated engine writes the same."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cluster.engines.adapter import EngineFacts, EngineLoad
from placement.speed_window import EngineCounters

GIB = 2**30
_KV_CACHE_TOKENS = re.compile(r"(?:\(EngineCore_DP(\d+)\b.*?)?KV cache size: ([\d,]+) tokens")
_WEIGHTS_GIB = re.compile(r"Model loading took ([\d.]+) GiB")
_BALANCE = re.compile(r"EPLB step: .*max_tokens=(\d+), balancedness=([\d.]+)")
_METRIC = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc"
    r"|time_to_first_token_seconds_(?:sum|count)|inter_token_latency_seconds_(?:sum|count)"
    r"|prompt_tokens_total|prefix_cache_hits_total|num_preemptions_total"
    r"|spec_decode_num_draft_tokens_total)(?:{.*})? (\S+)$",
    re.MULTILINE,
)
_FIRST, _NEXT = "time_to_first_token_seconds", "inter_token_latency_seconds"


def facts(log: str) -> EngineFacts:
    """KV tokens, of all data-parallel copies that log here; bytes of the heaviest rank's weights."""
    tokens = dict(_KV_CACHE_TOKENS.findall(log))  # the last line of each copy
    weights = _WEIGHTS_GIB.findall(log)
    return EngineFacts(
        kv_cache_tokens=sum(int(each.replace(",", "")) for each in tokens.values()) or None,
        weights_bytes=round(max(map(float, weights)) * GIB) if weights else None,
    )


def expert_balance(log: str) -> float | None:
    """The last balance of experts in these lines, of a step in which they had anything to do.

    Tokens of the mean rank over those of the busiest, summed over layers (eplb_state.py step).
    """
    told = [float(balance) for tokens, balance in _BALANCE.findall(log) if int(tokens)]
    return told[-1] if told else None


def load(metrics: str) -> EngineLoad:
    """Requests and totals summed, and KV usage averaged, over data parallel ranks."""
    values: dict[str, list[float]] = {}
    for name, value in _METRIC.findall(metrics):
        values.setdefault(name, []).append(float(value))
    usage = values.get("kv_cache_usage_perc", [0.0])
    return EngineLoad(
        running=int(sum(values.get("num_requests_running", ()))),
        waiting=int(sum(values.get("num_requests_waiting", ()))),
        kv_cache_usage=sum(usage) / len(usage),
        counters=_counters({name: sum(each) for name, each in values.items()}),
    )


def _counters(totals: Mapping[str, float]) -> EngineCounters | None:
    """An interval is counted when a token comes, so a window has its own ones only."""
    if f"{_FIRST}_count" not in totals or f"{_NEXT}_count" not in totals:
        return None
    return EngineCounters(
        prompts=totals[f"{_FIRST}_count"],
        ttft_s=totals[f"{_FIRST}_sum"],
        prompt_tokens=totals.get("prompt_tokens_total", 0.0),
        cached_tokens=totals.get("prefix_cache_hits_total", 0.0),
        intervals=totals[f"{_NEXT}_count"],
        intervals_s=totals[f"{_NEXT}_sum"],
        preemptions=totals.get("num_preemptions_total", 0.0),
        drafted=totals.get("spec_decode_num_draft_tokens_total", 0.0),
    )
