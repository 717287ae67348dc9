"""What the simulated engine serves, and how fast."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from cluster.engines.adapter import SIDE_CHANNEL_HOST, SIDE_CHANNEL_PORT
from cluster.engines.sim_batch import Limits, Timing
from cluster.engines.sim_drill import Fault
from cluster.engines.sim_transfer import Transfer


@dataclass(frozen=True, slots=True)
class Settings:
    """What is served, and how fast. `speed` divides all times. `fault`: None allows none."""

    model: str
    limits: Limits
    timing: Timing
    speed: float = 1.0
    api_key: str = ""
    has_token_ids: bool = True
    fault: Fault | None = None
    max_lora_rank: int = 0  # 0: no adapters
    data_parallel_size: int = 1
    transfer: Transfer | None = None  # None: KV caches stay where they are


def settings_of(options: argparse.Namespace, api_key: str) -> Settings:
    """From the command line's flags."""
    limits = Limits(
        options.max_num_seqs,
        options.max_num_batched_tokens,
        options.kv_cache_tokens,
        options.max_model_len,
    )
    timing = Timing(
        options.prefill_tokens_per_s,
        options.tpot_ms,
        max(options.tpot_ms, options.tpot_ms_at_max),
        options.max_num_seqs,
    )
    return Settings(
        options.model,
        limits,
        timing,
        options.speed,
        api_key,
        has_token_ids=not options.no_token_ids,
        fault=options.drill,
        max_lora_rank=options.max_lora_rank if options.enable_lora else 0,
        data_parallel_size=options.data_parallel_size,
        transfer=_transfer(options),
    )


def _transfer(options: argparse.Namespace) -> Transfer | None:
    """As vLLM's connector, it listens where the environment says."""
    if options.kv_transfer_config is None:
        return None
    return Transfer(
        options.kv_transfer_config,
        os.environ.get(SIDE_CHANNEL_HOST, options.host),
        int(os.environ.get(SIDE_CHANNEL_PORT, "0")),
        options.kv_transfer_tokens_per_s,
    )
