"""Token counts, found in an engine's answer without parsing all of it."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

USAGE_KEY = b'"usage"'
_LONGEST_USAGE_BYTES = 4096
# As OpenAI and vLLM write it; all else goes through the decoder.
_USUAL = re.compile(
    rb'"usage": ?\{"prompt_tokens": ?(\d{1,9}), ?(?:"total_tokens": ?\d{1,9}, ?)?'
    rb'"completion_tokens": ?(\d{1,9})[,}]'
)
_decoder = json.JSONDecoder()


class Usage(NamedTuple):
    """Tokens that went into an engine and came out of it."""

    prompt_tokens: int
    completion_tokens: int


def find_usage(data: bytes) -> Usage | None:
    """The last `usage` object in JSON or in events, under OpenAI's or Anthropic's names.

    Quotes inside of JSON strings are escaped, so that text of the model is never taken for it.
    """
    end = data.rfind(USAGE_KEY)
    if end < 0:
        return None
    usual = _USUAL.match(data, end)
    if usual is not None:
        return Usage(int(usual[1]), int(usual[2]))
    end = len(data)
    while (at := data.rfind(USAGE_KEY, 0, end)) >= 0:
        end = at
        start = at + len(USAGE_KEY)
        rest = data[start : start + _LONGEST_USAGE_BYTES].decode(errors="replace").lstrip()
        usage = _usage_of(rest[1:].lstrip()) if rest.startswith(":") else None
        if usage:
            return usage
    return None


def _usage_of(text: str) -> Usage | None:
    try:
        value, _ = _decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    prompt = value.get("prompt_tokens", value.get("input_tokens"))
    completion = value.get("completion_tokens", value.get("output_tokens"))
    return Usage(_count(prompt), _count(completion))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
