"""Clients of the drill: ask over HTTP or gRPC, note what came when, judge it afterwards."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import grpc
from google.protobuf.json_format import ParseDict, ParseError

from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from loadtests.sse import EventReader
from loadtests.stream_check import Question, Seen, Verdict, compare, read_chunks, read_events


@dataclass(slots=True)
class Stream:
    """One answer on the client's side. Times are of `time.perf_counter`, seconds."""

    seen: Seen
    arrivals_s: list[float] = field(default_factory=list)
    started_s: float = 0.0
    endpoint: str = ""

    @property
    def ttft_s(self) -> float | None:
        """From the request to the first bytes of the stream; None: there were none."""
        return self.arrivals_s[0] - self.started_s if self.arrivals_s else None

    @property
    def longest_gap_s(self) -> float:
        """The longest time without anything, seconds."""
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        return max((late - early for early, late in pairs), default=0.0)


@dataclass(slots=True)
class Judged:
    """A question, how its answer came, and what is wrong with it."""

    question: Question
    stream: Stream
    verdict: Verdict


class HttpAsker:
    """`async with` it. Asks over HTTP; a request ends after `timeout_s` at the latest."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._session = aiohttp.ClientSession(
            url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, question: Question) -> Stream:
        """The stream that answers `question`, however it ends."""
        arrived: list[tuple[float, bytes]] = []
        started_s = time.perf_counter()
        failure, endpoint = "", ""
        try:
            async with self._session.post(question.path, json=question.body) as response:
                endpoint = response.headers.get("x-bora-endpoint", "")
                async for data in response.content.iter_any():
                    arrived.append((time.perf_counter(), data))  # noqa: PERF401 - it may break off
                if response.status != 200:
                    failure = f"HTTP {response.status}: {arrived[-1][1][:160]!r}"
        except TimeoutError:
            failure = "no end within the client's patience"
        except (aiohttp.ClientError, ConnectionError) as error:
            failure = f"{type(error).__name__}: {error}"
        return _read(question, arrived, started_s, failure, endpoint)


def _read(
    question: Question,
    arrived: Sequence[tuple[float, bytes]],
    started_s: float,
    failure: str,
    endpoint: str,
) -> Stream:
    if failure.startswith("HTTP "):
        return Stream(Seen(problems=[failure]), [], started_s, endpoint)
    reader, events, arrivals_s = EventReader(), [], []
    for at_s, data in arrived:
        come = reader.feed(data)
        if come:  # and not a comment that only keeps the connection open
            events += come
            arrivals_s.append(at_s)
    seen = read_events(events, question)
    if failure:
        seen.problems.insert(0, failure)
    return Stream(seen, arrivals_s, started_s, endpoint)


class GrpcAsker:
    """The same over `bora.v1.Inference`."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        stub = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._chat: Callable[..., Any] = stub.ChatCompletionStream
        self._complete: Callable[..., Any] = stub.CompletionStream
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def ask(self, question: Question) -> Stream:
        """As `HttpAsker.ask`."""
        body = {name: value for name, value in question.body.items() if name != "stream"}
        request = _message(body, chat=question.chat)
        method = self._chat if question.chat else self._complete
        chunks: list[dict[str, Any]] = []
        stream = Stream(Seen(), started_s=time.perf_counter())
        failure = ""
        try:
            async for message in method(request, timeout=self._timeout_s):
                stream.arrivals_s.append(time.perf_counter())
                chunks.append(_chunk(message, chat=question.chat))
        except grpc.aio.AioRpcError as error:
            failure = f"{error.code().name}: {error.details()}"
        stream.seen = read_chunks(chunks, question)
        if failure:
            stream.seen.problems.insert(0, failure)
        return stream


def _message(body: dict[str, Any], *, chat: bool) -> Any:
    """Fields that the message has, and the others in `extra_json`."""
    form = pb.ChatCompletionRequest if chat else pb.CompletionRequest
    known = {name: value for name, value in body.items() if name in form.DESCRIPTOR.fields_by_name}
    extra = {name: value for name, value in body.items() if name not in known}
    try:
        return ParseDict({**known, "extra_json": json.dumps(extra)}, form())
    except ParseError as error:
        raise ValueError(f"not a question for gRPC: {error}") from error


def _chunk(message: Any, *, chat: bool) -> dict[str, Any]:
    """A message as the JSON chunk that it stands for."""
    choices = []
    for choice in message.choices:
        extra = json.loads(choice.extra_json or "{}")
        said: dict[str, Any] = {"text": "" if chat else choice.text}
        if chat:
            said = {"delta": {"role": choice.delta.role, "content": choice.delta.content}}
        choices.append({**extra, **said, "finish_reason": choice.finish_reason or None})
    chunk = {
        **json.loads(message.extra_json or "{}"),
        "id": message.id,
        "model": message.model,
        "created": message.created,
        "choices": choices,
    }
    if message.HasField("usage"):
        chunk["usage"] = {
            "prompt_tokens": message.usage.prompt_tokens,
            "completion_tokens": message.usage.completion_tokens,
            "total_tokens": message.usage.total_tokens,
        }
    return chunk


async def ask_all(
    asker: HttpAsker | GrpcAsker,
    asked: Sequence[Question],
    references: Sequence[Seen],
    *,
    concurrency: int,
) -> list[Judged]:
    """Ask everything, `concurrency` at a time, and compare with the undisturbed answers."""
    judged: list[Judged] = []
    waiting = iter(zip(asked, references, strict=True))

    async def work() -> None:
        for question, reference in waiting:
            stream = await asker.ask(question)
            judged.append(Judged(question, stream, compare(stream.seen, reference)))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return judged
