"""Simulated engines and conversations, to see what routing policies are worth. No sockets, no clock."""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from gateway.call import Call
from gateway.endpoints import Endpoint, EndpointTable, ServedModel
from gateway.record import Record
from gateway.routing import Lease, Router
from gateway.usage import Usage
from tests.gateway.engines import CHAT

STEP_S = 0.02
BLOCK_BYTES = 64  # 16 tokens, as vLLM has them
PREFILL_TOKENS_PER_S = 8000.0
STEP_BASE_S = 0.020  # a decode step alone,
STEP_PER_REQUEST_S = 0.002  # and for each request in it


@dataclass(eq=False)
class Job:
    lease: Lease
    router: Router
    asked: int  # prompt bytes
    prefill_tokens: float
    tokens_left: float
    tokens: int
    conversation: Conversation


@dataclass(eq=False)
class Engine:
    """Continuous batching with a prefix cache. Twice the `speed` takes half the time for all."""

    speed: float = 1.0
    cache_blocks: int = 6000
    jobs: list[Job] = field(default_factory=list)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    prompt_bytes: int = 0
    cached_bytes: int = 0
    work_s: float = 0.0  # at speed 1
    most_running: int = 0

    def start(self, job: Job, prompt: bytes) -> None:
        cached = self._see(prompt)
        self.prompt_bytes += len(prompt)
        self.cached_bytes += cached
        job.prefill_tokens = (len(prompt) - cached) / 4
        self.work_s += job.prefill_tokens / PREFILL_TOKENS_PER_S + job.tokens * STEP_PER_REQUEST_S
        self.jobs.append(job)
        self.most_running = max(self.most_running, len(self.jobs))

    def advance(self) -> list[Job]:
        """A time step; those that are done."""
        left = STEP_S * self.speed
        for job in self.jobs:
            spent = min(left, job.prefill_tokens / PREFILL_TOKENS_PER_S)
            job.prefill_tokens -= spent * PREFILL_TOKENS_PER_S
            left -= spent
        decoding = [job for job in self.jobs if job.prefill_tokens <= 0]
        step_s = STEP_BASE_S + STEP_PER_REQUEST_S * len(decoding)
        for job in decoding:
            job.tokens_left -= left / step_s
        done = [job for job in decoding if job.tokens_left <= 0]
        self.jobs = [job for job in self.jobs if job.tokens_left > 0]
        return done

    def _see(self, prompt: bytes) -> int:
        cached, chain, hit = 0, 0, True
        for at in range(0, len(prompt) - BLOCK_BYTES + 1, BLOCK_BYTES):
            chain = hash((chain, prompt[at : at + BLOCK_BYTES]))
            hit = hit and chain in self.cache
            cached += BLOCK_BYTES * hit
            self.cache[chain] = None
            self.cache.move_to_end(chain)
        while len(self.cache) > self.cache_blocks:
            self.cache.popitem(last=False)
        return cached


@dataclass(eq=False)
class Conversation:
    """Turns of one user, each with all that was said before."""

    name: str
    messages: list[dict[str, str]]
    turns_left: int
    random: Random

    def ask(self, *, with_session: bool) -> Call:
        self.turns_left -= 1
        self.messages.append(
            {"role": "user", "content": words(self.random, self.random.randint(40, 500))}
        )
        body = {"model": "chat", "messages": self.messages, "max_tokens": 400}
        headers = {"x-session-id": self.name} if with_session else {}
        return Call("http", CHAT, "chat", json.dumps(body).encode(), "id", headers)

    def hear(self, tokens: int) -> None:
        self.messages.append({"role": "assistant", "content": words(self.random, tokens)})


def words(random: Random, count: int) -> str:
    return " ".join(f"{random.randrange(1000):03d}" for _ in range(count))


def conversations(
    random: Random, count: int, over_s: float
) -> Iterator[tuple[float, Conversation]]:
    """When each begins. Four system prompts, of which one is that of more than half of them."""
    systems = [words(random, 800) for _ in range(4)]
    for n in range(count):
        system = random.choices(systems, (8, 4, 2, 1))[0]
        messages = [{"role": "system", "content": system}]
        turns = random.randint(2, 8)
        yield random.uniform(0, over_s), Conversation(f"c{n}", messages, turns, Random(n))


@dataclass(frozen=True)
class Outcome:
    """`shares`: of the work, per engine; `imbalance`: the largest over the mean, by speed."""

    hit_rate: float
    shares: tuple[float, ...]
    imbalance: float
    requests: int
    mean_s: float


def simulate(
    policy: str,
    *,
    speeds: Sequence[float] = (1.0,) * 6,
    planned: Sequence[float | None] | None = None,
    gateways: int = 1,
    with_session: bool = False,
    count: int = 220,
    over_s: float = 60.0,
    seed: int = 1,
) -> Outcome:
    engines = [Engine(speed) for speed in speeds]
    planned = planned or [1000 * speed for speed in speeds]
    table = EndpointTable(
        version=1,
        models=(ServedModel(name="chat", routing={"policy": policy}),),
        endpoints=tuple(
            Endpoint(model="chat", url=f"http://{n}", tokens_per_s=tokens, max_in_flight=256)
            for n, tokens in enumerate(planned)
        ),
    )
    routers = [Router(workers=gateways, seed=seed + n) for n in range(gateways)]
    for router in routers:
        router.apply(table)
    random = Random(seed)
    queue = [(at, n, talk) for n, (at, talk) in enumerate(conversations(random, count, over_s))]
    heapq.heapify(queue)
    now, number, durations = 0.0, count, []
    while queue or any(engine.jobs for engine in engines):
        now += STEP_S
        while queue and queue[0][0] <= now:
            _, _, talk = heapq.heappop(queue)
            router = random.choice(routers)
            call = talk.ask(with_session=with_session)
            lease = router.reserve("chat", now=now, call=call)
            tokens = random.randint(40, 200)
            job = Job(lease, router, len(call.body), 0.0, float(tokens), tokens, talk)
            engines[int(lease.endpoint.url[7:])].start(job, call.body[17:])
        for engine in engines:
            for job in engine.advance():
                record = Record(api="http", path=CHAT, request_id="id", status=200)
                record.usage = Usage(job.asked // 4, job.tokens)
                job.router.release(job.lease, now=now, record=record)
                durations.append(now - job.lease.since)
                job.conversation.hear(job.tokens)
                if job.conversation.turns_left:
                    number += 1
                    heapq.heappush(queue, (now + random.uniform(1, 6), number, job.conversation))
    work = [engine.work_s for engine in engines]
    by_speed = [engine.work_s / engine.speed for engine in engines]
    return Outcome(
        hit_rate=sum(e.cached_bytes for e in engines) / sum(e.prompt_bytes for e in engines),
        shares=tuple(each / sum(work) for each in work),
        imbalance=max(by_speed) * len(engines) / sum(by_speed),
        requests=len(durations),
        mean_s=sum(durations) / len(durations),
    )
