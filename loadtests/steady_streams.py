"""Steady streams: clients that ask all the time, and what became of every question.

Also samples, from the gateway itself, how many endpoints of the model take requests.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import aiohttp

from loadtests.drill_client import HttpAsker
from loadtests.drill_questions import questions
from loadtests.stream_check import Question, Seen, compare

_QUESTIONS = 32
_FULL_FOR_S = 1.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question. Times are of `time.perf_counter`, seconds."""

    asked_s: float
    ended_s: float
    endpoint: str
    problems: tuple[str, ...]
    first_bytes_s: float | None = None


@dataclass(frozen=True, slots=True)
class Capacity:
    """Endpoints that took requests at a moment; None: the gateway did not answer."""

    at_s: float
    ready: int | None
    usable: tuple[str, ...] = ()  # ids of those that nothing speaks against
    requests: Mapping[str, int] = field(default_factory=dict)  # sent to each, tries included


@dataclass(slots=True)
class SteadyStreams:
    """`async with` it: `clients` ask `model` at `url` from then on, each one question at a time.

    Every question is asked once before, undisturbed; each later answer must equal that one.
    """

    url: str
    model: str
    clients: int = 8
    max_tokens: int = 96
    sample_period_s: float = 0.05
    sample_timeout_s: float = 2.0  # a gateway that tells nothing for so long does not answer
    patience_s: float = 90.0
    outcomes: list[Outcome] = field(default_factory=list)
    samples: list[Capacity] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _stopping: bool = False
    _asked: list[Question] = field(default_factory=list)
    _references: list[Seen] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._asked = questions(_QUESTIONS, model=self.model, max_tokens=self.max_tokens)
        async with HttpAsker(self.url, timeout_s=self.patience_s) as asker:
            streams = await asyncio.gather(*(asker.ask(question) for question in self._asked))
        self._references = [stream.seen for stream in streams]
        for number in range(self.clients):
            self._tasks.append(asyncio.create_task(self._ask_forever(number)))
        self._tasks.append(asyncio.create_task(self._sample_forever()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Ask nothing more; what was asked is answered before this returns."""
        self._stopping = True
        tasks, self._tasks = self._tasks, []
        await asyncio.gather(*tasks)

    def failures(self, since_s: float = 0.0) -> list[Outcome]:
        """Questions asked since then whose answer is missing, broken or not the undisturbed one."""
        return [each for each in self.outcomes if each.problems and each.asked_s >= since_s]

    def least_ready(self, since_s: float = 0.0) -> int:
        """The lowest sampled capacity since then. A gateway that does not answer counts as 0."""
        return min((each.ready or 0 for each in self.samples if each.at_s >= since_s), default=0)

    def busiest(self) -> str:
        """The endpoint that began most answers lately, empty if none did."""
        lately = Counter(each.endpoint for each in self.outcomes[-100:] if each.endpoint)
        return lately.most_common(1)[0][0] if lately else ""

    def full_since(self, replicas: int, since_s: float, *, without: str = "") -> float | None:
        """From when on so many endpoints have taken requests, not before `since_s`.

        `without` is one that must be gone. None: now they do not, or not for long enough to tell.
        """
        begun_s = None
        for sample in self.samples:
            if sample.at_s < since_s:
                continue
            if len(sample.usable) < replicas or without in sample.usable:
                begun_s = None
            elif begun_s is None:
                begun_s = sample.at_s
        if begun_s is None or self.samples[-1].at_s - begun_s < _FULL_FOR_S:
            return None
        first = next(sample.at_s for sample in self.samples if sample.at_s >= since_s)
        return since_s if begun_s == first else begun_s

    def last_sent(self, endpoint: str, since_s: float, until_s: float = math.inf) -> float:
        """Seconds after `since_s` when a request was last sent to `endpoint`; 0: none was.

        What is sent after `until_s` does not count.
        """
        sent, last_s = None, since_s
        for sample in self.samples:
            count = sample.requests.get(endpoint)
            if count is None or sample.at_s > until_s:
                continue
            if sent is not None and count > sent and sample.at_s > since_s:
                last_s = sample.at_s
            sent = count
        return last_s - since_s

    async def _ask_forever(self, number: int) -> None:
        async with HttpAsker(self.url, timeout_s=self.patience_s) as asker:
            while not self._stopping:
                number = (number + 5) % len(self._asked)
                stream = await asker.ask(self._asked[number])
                verdict = compare(stream.seen, self._references[number])
                first = stream.arrivals_s[0] if stream.arrivals_s else None
                self.outcomes.append(
                    Outcome(
                        asked_s=stream.started_s,
                        ended_s=time.perf_counter(),
                        endpoint=stream.endpoint,
                        problems=verdict.problems,
                        first_bytes_s=first,
                    )
                )
                if verdict.problems:
                    await asyncio.sleep(0.1)  # a gateway that is gone refuses at once

    async def _sample_forever(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self.sample_timeout_s)
        async with aiohttp.ClientSession(self.url, timeout=timeout) as session:
            while not self._stopping:
                self.samples.append(await self._sample(session))
                await asyncio.sleep(self.sample_period_s)

    async def _sample(self, session: aiohttp.ClientSession) -> Capacity:
        at_s = time.perf_counter()
        try:
            async with session.get("/console/data") as response:
                page = await response.json()
        except (aiohttp.ClientError, TimeoutError):
            return Capacity(at_s, None)
        ready = {model["name"]: model["ready"] for model in page["models"]}
        ours = [each for each in page["endpoints"] if each["model"] == self.model]
        well = [each for each in ours if each["state"] == "ready" and each["breaker"] == "closed"]
        return Capacity(
            at_s,
            ready.get(self.model, 0),
            tuple(each["key"] for each in well),
            {each["key"]: each["requests"] for each in ours},
        )
