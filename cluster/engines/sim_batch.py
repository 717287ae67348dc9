"""How long the simulated engine takes: continuous batching, step by step, without a clock.

add(generation) -> waiting, first in first out
schedule()      -> admits while a request slot and KV cache are free, then plans one step:
                   a token for each request that decodes, and the token budget's rest of prefill
(the caller lets step.duration_s pass)
finish(step)    -> the tokens of that step; ended requests leave
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from cluster.engines.sim_text import Continuation, StopStrings
from cluster.engines.sim_vocabulary import END_OF_SEQUENCE


@dataclass(frozen=True, slots=True)
class Timing:
    """How fast the engine is.

    A step takes TPOT at the number of requests in it, a straight line between `tpot_ms` (one
    request) and `tpot_ms_at_max` (`max_num_seqs` requests), and the time of the prompt tokens in it.
    """

    prefill_tokens_per_s: float
    tpot_ms: float
    tpot_ms_at_max: float
    max_num_seqs: int

    def step_s(self, *, num_requests: int, prefill_tokens: int) -> float:
        """Duration of one step, seconds."""
        share = (num_requests - 1) / max(self.max_num_seqs - 1, 1)
        decode_ms = self.tpot_ms + (self.tpot_ms_at_max - self.tpot_ms) * share
        return decode_ms / 1000 + prefill_tokens / self.prefill_tokens_per_s


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int
    max_model_len: int


class Delta(NamedTuple):
    """What one step adds to an answer."""

    text: str  # may lag behind its tokens: half a character, or what may begin a stop string
    token_id: int
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | None = None


@dataclass(slots=True, eq=False)
class Generation:
    """A request in the engine."""

    prompt_tokens: int
    max_tokens: int
    continuation: Continuation
    stop: StopStrings = field(default_factory=lambda: StopStrings(()))
    min_tokens: int = 0
    kept_as: str = ""  # name under which its prompt's KV cache stays when it has finished
    prefilled_tokens: int = 0
    completion_tokens: int = 0

    @property
    def reserved_tokens(self) -> int:
        """KV cache that it may come to need, tokens."""
        return self.prompt_tokens + self.max_tokens

    @property
    def prefill_left(self) -> int:
        """Prompt tokens that are not in the KV cache yet."""
        return self.prompt_tokens - self.prefilled_tokens

    def advance(self) -> Delta:
        """Generate one token. The end-of-sequence token counts as one, as in vLLM."""
        self.completion_tokens += 1
        token = self.continuation.next_token(may_end=self.completion_tokens > self.min_tokens)
        if token.id == END_OF_SEQUENCE:
            return Delta(self.stop.flush(), token.id, "stop")
        text, stopped_by = self.stop.push(token.text)
        if stopped_by:
            return Delta(text, token.id, "stop", stopped_by)
        if self.completion_tokens >= self.max_tokens:
            return Delta(text + self.stop.flush(), token.id, "length")
        return Delta(text, token.id)


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: who decodes, and how many prompt tokens of whom are prefilled."""

    decodes: Sequence[Generation]
    prefills: Sequence[tuple[Generation, int]]
    duration_s: float


class Batch:
    """Requests that run and wait. `max_num_seqs` run at most, if their KV cache fits.

    A request keeps room for its prompt and its `max_tokens` from admission to end, so none is ever
    preempted (vLLM allocates as it goes and preempts instead).
    """

    def __init__(self, limits: Limits, timing: Timing) -> None:
        self.limits = limits
        self.timing = timing
        self.running: list[Generation] = []
        self.waiting: deque[Generation] = deque()
        self.reserved_tokens = 0

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache that is reserved, 0..1."""
        return self.reserved_tokens / self.limits.kv_cache_tokens

    def add(self, generation: Generation) -> None:
        """Queue a request; it must fit into an empty engine."""
        self.waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """Forget a request, wherever it is; its slot and KV cache are free at once."""
        if generation in self.running:
            self.running.remove(generation)
            self.reserved_tokens -= generation.reserved_tokens
        elif generation in self.waiting:
            self.waiting.remove(generation)

    def schedule(self) -> Step | None:
        """Admit what fits and plan the next step; None: there is nothing to do."""
        self._admit()
        decodes = [generation for generation in self.running if generation.prefill_left == 0]
        budget = self.limits.max_num_batched_tokens - len(decodes)
        prefills: list[tuple[Generation, int]] = []
        for generation in self.running:
            chunk = min(generation.prefill_left, budget)
            if chunk > 0:
                prefills.append((generation, chunk))
                budget -= chunk
        if not decodes and not prefills:
            return None
        duration_s = self.timing.step_s(
            num_requests=len(decodes) + len(prefills),
            prefill_tokens=sum(chunk for _, chunk in prefills),
        )
        return Step(decodes, prefills, duration_s)

    def finish(self, step: Step) -> list[tuple[Generation, Delta]]:
        """Tokens of `step`, without requests that were removed while it ran."""
        for generation, chunk in step.prefills:
            generation.prefilled_tokens += chunk
        here = set(self.running)
        deltas = [
            (generation, generation.advance())
            for generation in (*step.decodes, *(generation for generation, _ in step.prefills))
            if generation in here and generation.prefill_left == 0
        ]
        for generation, delta in deltas:
            if delta.finish_reason:
                self.remove(generation)
                if generation.kept_as:
                    self.reserved_tokens += generation.prompt_tokens
        return deltas

    def let_go(self, tokens: int) -> None:
        """So many tokens of KV cache that were kept are free."""
        self.reserved_tokens -= tokens

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.max_num_seqs:
            needed = self.waiting[0].reserved_tokens
            if self.reserved_tokens + needed > self.limits.kv_cache_tokens:
                return
            self.running.append(self.waiting.popleft())
            self.reserved_tokens += needed
