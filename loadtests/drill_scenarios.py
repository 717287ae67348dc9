"""The rows of the drill: what befalls the engines, and what the clients saw of it."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from loadtests.drill_client import GrpcAsker, HttpAsker, Judged, ask_all
from loadtests.drill_disconnects import disconnect_latencies_s
from loadtests.drill_engines import MODEL, EngineKind, Engines, meanwhile, running
from loadtests.drill_processes import Process, gateway, metrics_of
from loadtests.drill_questions import questions
from loadtests.stream_check import Question, Seen, percentile

_MAX_CANCELLATION_S = 0.1
_NUM_PREFILLS = 2
_PREFILL_MIN_TOKENS = 16  # the drill's prompts are short
_IDLE_TIMEOUT_S = 30.0
_REFERENCE_TPOT_MS = 0.5
_PATIENCE_WITH_REAL_ENGINES_S = 300.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is asked."""

    requests: int = 800  # of the rows in which engines die
    faulty_requests: int = 128  # of the others
    distinct: int = 96
    concurrency: int = 64
    max_tokens: int = 200
    tpot_ms: float = 10.0
    kill_every_s: float = 3.0
    down_s: float = 1.0
    patience_s: float = 20.0
    judged_share: float = 0.99  # of departures that an engine must know of within 100 ms

    @classmethod
    def quick(cls) -> Self:
        """For CI, where a slow machine is no fault: what counts is that every stream is right."""
        return cls(
            requests=200,
            faulty_requests=64,
            distinct=32,
            concurrency=32,
            max_tokens=100,
            kill_every_s=1.5,
            down_s=0.5,
            patience_s=120.0,
            judged_share=0.5,
        )


Befall = Callable[[Engines, Scale], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row. `engines` None: as many as the user says; `befalls` is what happens meanwhile."""

    name: str
    befalls: Befall
    engines: int | None = None
    prefills: int = 0  # the first so many engines only read prompts, for the others
    kills: bool = False
    grpc: bool = False
    leaves: bool = False  # it is the clients that break off
    quick: bool = True
    needs_simulated: bool = True


@dataclass(slots=True)
class Row:
    """What came of one scenario. Times in seconds."""

    name: str
    requests: int
    failed: int = 0
    duplicated_tokens: int = 0
    missing_tokens: int = 0
    migrations: float = math.nan
    ttft_p50_s: float = math.nan
    ttft_p99_s: float = math.nan
    longest_gap_s: float = math.nan
    notes: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)  # beside failed streams
    examples: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Every stream was whole and equal to the undisturbed one, and nothing is left over."""
        return not (self.failed or self.duplicated_tokens or self.missing_tokens or self.misses)

    def line(self) -> str:
        """A line of the table."""
        notes = [*(f"MISS: {miss}" for miss in self.misses), *self.notes]
        values = [
            *(self.name, self.requests, self.failed, self.duplicated_tokens, self.missing_tokens),
            "?" if math.isnan(self.migrations) else f"{self.migrations:.0f}",
            *(f"{value * 1000:.0f}" for value in (self.ttft_p50_s, self.ttft_p99_s)),
            *(f"{self.longest_gap_s:.2f}", "; ".join(notes)),
        ]
        return f"| {' | '.join(map(str, values))} |"


@dataclass(frozen=True, slots=True)
class Setup:
    """What every scenario is played with. `folder` takes logs."""

    kind: EngineKind
    scale: Scale
    num_engines: int
    gateway_options: Sequence[str]
    folder: Path


async def run(scenario: Scenario, setup: Setup) -> Row:
    """Play one scenario from the start of its processes to their end.

    Raises:
        CannotRun: a process does not come up.
    """
    scale, folder = setup.scale, setup.folder
    count = scenario.engines or setup.num_engines
    asked = questions(scale.distinct, model=MODEL, max_tokens=scale.max_tokens)
    if not setup.kind.simulated:  # two cores compute them all
        scale = replace(scale, patience_s=_PATIENCE_WITH_REAL_ENGINES_S)
    kind = replace(setup.kind, hands_over=scenario.prefills > 0)
    async with running(kind, count, folder) as engines:
        references = await _references(asked, setup, engines)
        ports = [process.port for process in engines.processes]
        limits = dict.fromkeys(ports, 256)
        options, roles = list(setup.gateway_options), {}
        if scenario.prefills:
            roles = dict.fromkeys(ports, "decode")
            roles |= dict.fromkeys(ports[: scenario.prefills], "prefill")
            options += ["--prefill-min-tokens", str(_PREFILL_MIN_TOKENS)]
        process = gateway(folder, limits, *options, model=MODEL, grpc=scenario.grpc, roles=roles)
        await process.start()
        try:
            if scenario.leaves:
                return await _leave(scenario, process, engines, scale)
            tasks = list(zip(asked, references, strict=True))
            return await _ask(scenario, process, engines, scale, tasks)
        finally:
            process.kill()


async def _references(asked: Sequence[Question], setup: Setup, engines: Engines) -> list[Seen]:
    """The undisturbed answers, from an engine without a gateway."""
    if setup.kind.simulated:  # what it says does not depend on its speed
        fast = EngineKind(tpot_ms=_REFERENCE_TPOT_MS)
        async with running(fast, 1, setup.folder) as others:
            return await _answers(asked, others.processes[0].url, setup.scale)
    return await _answers(asked, engines.processes[0].url, setup.scale)


async def _answers(asked: Sequence[Question], url: str, scale: Scale) -> list[Seen]:
    async with HttpAsker(url, timeout_s=300) as asker:
        undisturbed = [Seen()] * len(asked)
        judged = await ask_all(asker, asked, undisturbed, concurrency=scale.concurrency)
    by_question = {id(one.question): one.stream.seen for one in judged}
    return [by_question[id(question)] for question in asked]


async def _ask(
    scenario: Scenario,
    process: Process,
    engines: Engines,
    scale: Scale,
    tasks: Sequence[tuple[Question, Seen]],
) -> Row:
    count = scale.requests if scenario.kills else scale.faulty_requests
    turns = list(itertools.islice(itertools.cycle(tasks), count))
    before = await metrics_of(process.url)
    address = f"127.0.0.1:{process.grpc_port}"
    asker = (
        GrpcAsker(address, timeout_s=scale.patience_s)
        if scenario.grpc
        else HttpAsker(process.url, timeout_s=scale.patience_s)
    )
    started_s = time.perf_counter()
    async with asker, scenario.befalls(engines, scale):
        judged = await ask_all(
            asker,
            [question for question, _ in turns],
            [reference for _, reference in turns],
            concurrency=scale.concurrency,
        )
    row = _row(scenario.name, judged)
    row.notes.append(f"{len(engines.processes)} replicas, {time.perf_counter() - started_s:.0f} s")
    if engines.num_killed:
        row.notes.append(f"{engines.num_killed} engines struck")
    _note_shares(row, judged, engines)
    await _note_metrics(row, process, before)
    return row


async def _leave(scenario: Scenario, process: Process, engines: Engines, scale: Scale) -> Row:
    """Clients break off at any point; how soon does the engine know?"""
    before = await metrics_of(process.url)
    latencies_s, num_untold = await disconnect_latencies_s(
        process.url, engines, requests=scale.faulty_requests, concurrency=scale.concurrency
    )
    row = Row(scenario.name, scale.faulty_requests)
    p50_s, p99_s = percentile(latencies_s, 0.5), percentile(latencies_s, 0.99)
    judged_s = percentile(latencies_s, scale.judged_share)
    row.notes.append(f"engine knows after p50 {p50_s * 1000:.1f} ms, p99 {p99_s * 1000:.1f} ms")
    if num_untold:
        row.misses.append(f"engines were never told of {num_untold} departures")
    if not judged_s <= _MAX_CANCELLATION_S:
        limit = f"{_MAX_CANCELLATION_S * 1000:.0f} ms"
        row.misses.append(f"p{scale.judged_share * 100:.0f} is over {limit}")
    await _note_metrics(row, process, before)
    return row


def _row(name: str, judged: Sequence[Judged]) -> Row:
    row = Row(name, len(judged))
    wrong = [one for one in judged if one.verdict.problems]
    row.failed = len(wrong)
    row.duplicated_tokens = sum(one.verdict.duplicated_tokens for one in judged)
    row.missing_tokens = sum(one.verdict.missing_tokens for one in judged)
    ttfts_s = [one.stream.ttft_s for one in judged if one.stream.ttft_s is not None]
    row.ttft_p50_s, row.ttft_p99_s = percentile(ttfts_s, 0.5), percentile(ttfts_s, 0.99)
    row.longest_gap_s = max((one.stream.longest_gap_s for one in judged), default=math.nan)
    kinds = Counter(_without_digits(one.verdict.problems[0])[:150] for one in wrong)
    row.examples = [f"{count} x {problem}" for problem, count in kinds.most_common(4)]
    forms = Counter(one.question.form for one in wrong)
    row.examples += [f"{count} of them: {form}" for form, count in forms.most_common(8)]
    return row


def _without_digits(text: str) -> str:
    """So that problems that differ in ports and counts only are told once."""
    return "".join("#" if character.isdigit() else character for character in text)


def _note_shares(row: Row, judged: Sequence[Judged], engines: Engines) -> None:
    """How much the first engine, the faulty one, was still given."""
    first = engines.processes[0].url
    told = [one.stream.endpoint for one in judged if one.stream.endpoint]
    faulty = told and not engines.num_killed and row.name != "undisturbed"
    if faulty and len(engines.processes) > 1:
        row.notes.append(f"faulty engine gave {told.count(first) / len(told):.0%} of the answers")


async def _note_metrics(row: Row, process: Process, before: dict[str, float]) -> None:
    """Migrations, retries, and whether anything is left in flight."""
    deadline_s = time.monotonic() + _IDLE_TIMEOUT_S
    while True:
        after = await metrics_of(process.url)
        left = after.get("bora_gateway_in_flight", 0.0) + after.get("bora_gateway_queued", 0.0)
        if not left or time.monotonic() > deadline_s:
            break
        await asyncio.sleep(0.05)
    if left:
        row.misses.append(f"{left:.0f} requests still counted in flight")

    def grown(name: str) -> float:
        return after.get(name, math.nan) - before.get(name, 0.0)

    row.migrations = grown("bora_gateway_migrations_total")
    if not math.isnan(retries := grown("bora_gateway_retries_total")):
        row.notes.append(f"{retries:.0f} retries")
    if not math.isnan(prefills := grown("bora_gateway_prefill_duration_seconds_count")):
        row.notes.append(f"{prefills:.0f} prompts sent elsewhere")


def _fault(**fault: Any) -> Befall:
    """The first engine fails so from the beginning; the others serve."""

    @asynccontextmanager
    async def befalls(engines: Engines, _: Scale) -> AsyncIterator[None]:
        await engines.set_fault(0, **fault)
        yield

    return befalls


@asynccontextmanager
async def _nothing(_engines: Engines, _scale: Scale) -> AsyncIterator[None]:
    yield


def _in_turn(name: str) -> Befall:
    def befalls(engines: Engines, scale: Scale) -> AbstractAsyncContextManager[None]:
        return meanwhile(getattr(engines, name)(scale.kill_every_s, scale.down_s))

    return befalls


def _kill_prefills(engines: Engines, scale: Scale) -> AbstractAsyncContextManager[None]:
    return meanwhile(engines.kill_in_turn(scale.kill_every_s, scale.down_s, among=_NUM_PREFILLS))


_KILL = _in_turn("kill_in_turn")
SCENARIOS = (
    Scenario("undisturbed", _nothing, needs_simulated=False, quick=False),
    Scenario("kill", _KILL, kills=True, needs_simulated=False),
    Scenario("kill-1-restarted", _KILL, engines=1, kills=True, needs_simulated=False),
    Scenario("kill-prefill", _kill_prefills, prefills=_NUM_PREFILLS, kills=True),
    Scenario("kill-grpc", _KILL, kills=True, grpc=True, needs_simulated=False),
    Scenario("kill-after-n-tokens", _fault(kind="kill", after_tokens=20), quick=False),
    Scenario("slow", _fault(kind="slow", slowdown=5)),
    Scenario("frozen-in-turn", _in_turn("freeze_in_turn"), needs_simulated=False, quick=False),
    Scenario("black-hole-before-head", _fault(kind="silence", everywhere=True), quick=False),
    Scenario("black-hole-mid-stream", _fault(kind="silence", after_tokens=20)),
    Scenario("reset-before-head", _fault(kind="reset"), quick=False),
    Scenario("reset-after-head", _fault(kind="reset", after_tokens=0), quick=False),
    Scenario("reset-mid-stream", _fault(kind="reset", after_tokens=20), quick=False),
    Scenario("garbage-instead-of-http", _fault(kind="garbage"), quick=False),
    Scenario("garbage-mid-stream", _fault(kind="garbage", after_tokens=20), quick=False),
    Scenario("garbage-event", _fault(kind="garbage-event", after_tokens=20)),
    Scenario("status-500", _fault(kind="status"), quick=False),
    Scenario("clients-leave", _nothing, leaves=True),
)
