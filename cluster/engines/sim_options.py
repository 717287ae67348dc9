"""Command line of the simulated engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from cluster.engines.sim_drill import Fault
from cluster.engines.sim_transfer import TransferConfig

NumberT = TypeVar("NumberT", int, float)
FormT = TypeVar("FormT", bound=BaseModel)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags as attributes; ends the process with status 2 when they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.engines.sim_server",
        description="OpenAI-compatible server without weights. VLLM_API_KEY: the key it asks for.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="the name that requests give")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="0: any free one; the log tells")
    add("--max-model-len", type=_positive(int), default=32768, help="context, tokens")
    add("--max-num-seqs", type=_positive(int), default=256, help="requests that run at once")
    add("--max-num-batched-tokens", type=_positive(int), default=8192, help="of one step")
    add("--kv-cache-tokens", type=_positive(int), default=262144, help="KV cache, tokens")
    add("--weights-bytes", type=_positive(int), default=2**30, help="of one rank; only logged")
    add("--prefill-tokens-per-s", type=_positive(float), default=20000.0, help="prompt speed")
    add("--tpot-ms", type=_positive(float), default=10.0, help="step time with one request")
    add("--tpot-ms-at-max", type=float, default=30.0, help="step time with max-num-seqs requests")
    add("--speed", type=_positive(float), default=1.0, help="divides prefill and decode times")
    add("--data-parallel-size", type=_positive(int), default=1, help="copies that share the load")
    add(
        "--data-parallel-size-local",
        type=_positive(int),
        help="of them on this node, and logged here; default: all",
    )
    add("--enable-lora", action="store_true", help="adapters may be loaded while it runs")
    add("--max-lora-rank", type=_positive(int), default=16, help="of the widest adapter")
    add("--kv-transfer-config", type=_transfer_config, help="vLLM's: KV caches go to other engines")
    add("--kv-transfer-tokens-per-s", type=_positive(float), default=100000.0, help="fetched")
    add("--start-delay-s", type=float, default=0.0, help="simulated load time, before listening")
    add("--fail-after-s", type=float, help="drill: exit with status 1 so long after the start")
    add(
        "--fetch-weights",
        action="store_true",
        help="bora fetches the checkpoint before, as for a real engine; nobody reads it",
    )
    add(
        "--no-token-ids",
        action="store_true",
        help="as engines other than vLLM: no return_token_ids, and prompts are text",
    )
    add(
        "--drill",
        nargs="?",
        type=_fault,
        const=Fault(),
        metavar="FAULT",
        help='allow faults on request (POST /drill); {"kind": "slow", "slowdown": 10}: begin so',
    )
    options = parser.parse_args(arguments)
    if options.kv_cache_tokens < options.max_model_len:
        parser.error(
            f"the KV cache ({options.kv_cache_tokens} tokens) must hold one request of "
            f"--max-model-len ({options.max_model_len} tokens): lower it"
        )
    return options


def _positive(number: type[NumberT]) -> Callable[[str], NumberT]:
    def positive(text: str) -> NumberT:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    return positive


def _fault(text: str) -> Fault:
    return _parsed(text, Fault, "a fault")


def _transfer_config(text: str) -> TransferConfig:
    return _parsed(text, TransferConfig, "a config of vLLM's NixlConnector")


def _parsed(text: str, form: type[FormT], what: str) -> FormT:
    try:
        return form.model_validate_json(text)
    except ValidationError as error:
        [problem, *_] = error.errors()
        where = ".".join(map(str, problem["loc"]))
        raise argparse.ArgumentTypeError(
            f"{text} is not {what}: {where}: {problem['msg']}"
        ) from None
