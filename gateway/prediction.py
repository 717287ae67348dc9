"""What a request will cost in tokens, guessed from its bytes before an engine has seen it."""

from __future__ import annotations

from functools import lru_cache

BYTES_PER_TOKEN = 4
TOKENS_PER_IMAGE = 1024
_BASE64 = b";base64,"
USUAL_COMPLETION_TOKENS = 256.0
_MEMORY = 0.95  # of the running mean, per answer
_GENERATING = ("/completions", "/responses", "/messages")


def prompt_tokens(body: bytes) -> int:
    """About how many tokens go in: four bytes each, and a fixed price for an inlined image."""
    if _BASE64 not in body:
        return max(1, len(body) // BYTES_PER_TOKEN)
    first, *rest = body.split(_BASE64)
    text_bytes = len(first)
    for part in rest:
        end = part.find(b'"')
        text_bytes += len(part) - end if end >= 0 else 0
    return max(1, text_bytes // BYTES_PER_TOKEN) + len(rest) * TOKENS_PER_IMAGE


@lru_cache(maxsize=256)
def generates(path: str) -> bool:
    """Whether requests to `path` are answered with new tokens."""
    return path.endswith(_GENERATING)


class RunningMean:
    """Tokens in a model's answers lately."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = USUAL_COMPLETION_TOKENS

    def add(self, tokens: int) -> None:
        """An answer had so many."""
        self.value = _MEMORY * self.value + (1 - _MEMORY) * tokens
