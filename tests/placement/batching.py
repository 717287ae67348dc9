"""A small discrete-event simulation of continuous batching: one replica, step by step.

It takes the same seconds for a step as `placement.performance`, so that what it checks is queueing:
waiting for slots and cache, prompts that share steps with answers, and preemption. As vLLM V1 does:
running requests first, then waiting prompts in the order in which they came, up to
max_num_batched_tokens of a step; a prompt starts when its tokens fit in the cache; when an answer
finds no room, the request that came last gives its cache back and computes it again.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from placement.fleet import TokenLengths
from placement.performance import ReplicaSpeed, prefill_work_s, step_s
from placement.queueing import lognormal_sigma


@dataclass(slots=True)
class Request:
    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefilled: int = 0
    generated: int = 0
    first_token_s: float = math.nan
    end_s: float = math.nan

    @property
    def held(self) -> int:
        """Tokens in the cache."""
        return self.prefilled + self.generated

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        return (self.end_s - self.first_token_s) / max(1, self.output_tokens - 1)


@dataclass(slots=True)
class Replica:
    """Requests that run, and those that wait."""

    speed: ReplicaSpeed
    clock_s: float
    running: list[Request]
    waiting: deque[Request]

    def step(self) -> list[Request]:
        """One pass; the requests that it finished."""
        self._make_room()
        decoding = [each for each in self.running if each.prefilled == self._wanted(each)]
        budget = self.speed.max_num_batched_tokens - len(decoding)
        work, started = 0.0, []
        for request, tokens in self._chunks(budget):
            work += self._work_s(request.prefilled, tokens)
            request.prefilled += tokens
            if request.prefilled == self._wanted(request):
                started.append(request)
        context = sum(each.held for each in decoding) / max(1, len(decoding))
        seconds = step_s(self.speed, concurrency=max(1, len(decoding)), context=context)
        self.clock_s += self._step_s(seconds, work)
        for request in [*decoding, *started]:
            request.generated += 1
            if math.isnan(request.first_token_s):
                request.first_token_s = self.clock_s + self.speed.efficiency.request_s
        done = [each for each in self.running if each.generated >= each.output_tokens]
        for request in done:
            request.end_s = self.clock_s + self.speed.efficiency.request_s
        self.running = [each for each in self.running if each.generated < each.output_tokens]
        return done

    def _step_s(self, decode_s: float, work_s: float) -> float:
        return decode_s + work_s

    def _wanted(self, request: Request) -> int:
        return request.input_tokens

    def _chunks(self, budget: int) -> Iterator[tuple[Request, int]]:
        for request in list(self.running):
            missing = min(budget, request.input_tokens - request.prefilled)
            if missing > 0:
                budget -= missing
                yield request, missing
        while self.waiting and budget > 0 and len(self.running) < self.speed.max_num_seqs:
            request = self.waiting[0]
            room = self.speed.kv_cache_tokens - sum(each.held for each in self.running)
            if request.input_tokens + request.generated > room and self.running:
                return
            self.running.append(self.waiting.popleft())
            tokens = min(budget, request.input_tokens)
            budget -= tokens
            yield request, tokens

    def _make_room(self) -> None:
        while len(self.running) > 1:
            held = sum(each.held for each in self.running) + len(self.running)
            if held <= self.speed.kv_cache_tokens:
                return
            last = self.running.pop()
            last.prefilled = 0
            self.waiting.appendleft(last)

    def _work_s(self, before: int, tokens: int) -> float:
        return prefill_work_s(self.speed, before + tokens) - prefill_work_s(self.speed, before)


class Reading(Replica):
    """Prompts only: weights are read while they are worked on, and no answer's step comes before."""

    def _step_s(self, decode_s: float, work_s: float) -> float:
        return max(decode_s, work_s)


class Writing(Replica):
    """Prompts come with their KV cache, so that they take no work."""

    def _work_s(self, before: int, tokens: int) -> float:
        return 0.0


def open_loop(
    speed: ReplicaSpeed, requests: Sequence[Request], *, of: type[Replica] = Replica
) -> list[Request]:
    """Requests come when they come, to a replica of that kind."""
    replica = of(speed, 0.0, [], deque())
    coming, done = deque(requests), []
    while len(done) < len(requests):
        if not replica.running and not replica.waiting:
            replica.clock_s = max(replica.clock_s, coming[0].arrival_s)
        while coming and coming[0].arrival_s <= replica.clock_s:
            replica.waiting.append(coming.popleft())
        done += replica.step()
    return done


def closed_loop(
    speed: ReplicaSpeed, concurrency: int, lengths: Sequence[tuple[int, int]]
) -> list[Request]:
    """`concurrency` clients, who begin together and send their next request when one ends."""
    left = deque(lengths)
    first = [Request(0.0, *left.popleft()) for _ in range(concurrency)]
    replica, done = Replica(speed, 0.0, [], deque(first)), []
    while len(done) < len(lengths):
        for request in replica.step():
            done.append(request)
            if left:
                replica.waiting.append(Request(replica.clock_s, *left.popleft()))
    return done


def poisson(
    rate_per_s: float,
    count: int,
    *,
    input_tokens: TokenLengths,
    output_tokens: TokenLengths,
    seed: int,
) -> list[Request]:
    """Requests whose lengths are lognormal with this mean and 95th percentile."""
    draw, clock, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        clock += draw.expovariate(rate_per_s)
        requests.append(Request(clock, _tokens(input_tokens, draw), _tokens(output_tokens, draw)))
    return requests


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _tokens(lengths: TokenLengths, draw: random.Random) -> int:
    sigma = lognormal_sigma(lengths)
    mu = math.log(lengths.mean) - sigma**2 / 2
    return max(1, round(draw.lognormvariate(mu, sigma)))
