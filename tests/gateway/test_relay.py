"""A stream that goes on chunk by chunk as it came is the same, for client and transcript, as one read.

Whatever an engine says, however HTTP's chunks lie around it and wherever the network cuts it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.answer import Answer
from gateway.answer_cache import AnswerCache
from gateway.engine_connection import EngineConnection
from gateway.errors import EngineBroke
from gateway.record import Record
from gateway.relay import Relay
from gateway.transcript import Transcript
from tests.gateway.test_engine_connection import EVENTS, EnginePipe

Event = dict[str, Any]


def chunk(text: str = "", ids: list[int] | None = None, **delta: Any) -> Event:
    said = {"content": text, **delta}
    choice = {"index": 0, "delta": said, "logprobs": None, "finish_reason": None, "token_ids": ids}
    return {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


FIRST = {**chunk(role="assistant"), "prompt_token_ids": [1, 2]}
USAGE = {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}


def with_choice(event: Event, **more: Any) -> Event:
    return {**event, "choices": [{**event["choices"][0], **more}]}


texts = st.text(max_size=6) | st.sampled_from(
    [' "x"', "\\", "\n\n", "ö€", '"finish_reason":null', "[1]"]
)
ids = st.none() | st.lists(st.integers(0, 200_000), min_size=1, max_size=3)
events = st.one_of(
    st.builds(chunk, texts, ids),
    st.builds(chunk, texts, ids),
    st.builds(chunk, texts, ids),
    st.builds(lambda ids: with_choice(chunk("", ids), delta={}), ids),  # a parser swallowed them
    st.builds(lambda text: with_choice(chunk(), delta={"reasoning": text}), texts),
    st.builds(lambda: with_choice(chunk(), delta={"tool_calls": [{"index": 0}]})),
    st.builds(lambda text: with_choice(chunk(text), index=1), texts),
    st.builds(lambda text: {**chunk(text), "usage": USAGE}, texts),
)
endings = st.sampled_from(
    [
        [],
        [with_choice(chunk("."), finish_reason="stop")],
        [
            with_choice(chunk("", [9]), finish_reason="length"),
            {**FIRST, "choices": [], "usage": USAGE},
        ],
        [with_choice(chunk("."), finish_reason="abort")],
        [{"error": {"message": "worker died", "code": 500}}],
    ]
)


@dataclass
class Outcome:
    """What the client has of a stream, and what is known of it."""

    client: bytes = b""
    faults: int = 0
    known: list[Any] = field(default_factory=list)


class Stream:
    """A listener that relays, as an exchange does it."""

    def __init__(self, *, hides_ids: bool, max_unread: int, takes_chunks: bool) -> None:
        self.outcome = Outcome()
        self.record = Record("http", "/v1/chat/completions", "id")
        self.told = Transcript(is_chat=True, hides_ids=hides_ids, max_unread=max_unread)
        self.connection: EngineConnection | None = None
        self._takes_chunks = takes_chunks
        self.relay = Relay(
            self.record, self._write_first, transcript=self.told, rename=None, on_fault=self._fault
        )

    def _write_first(self, data: bytes) -> None:
        self.relay.write = self._write
        self._write(data)
        if self._takes_chunks and self.connection is not None:
            self.relay.write_chunks = self._write_chunks
            self.connection.take_chunks = self.relay.feed_chunks

    def _write(self, data: bytes) -> None:
        self.outcome.client += data

    def _write_chunks(self, data: bytes) -> None:
        while data:
            size, _, data = data.partition(b"\r\n")
            end = int(size, 16)
            assert data[end : end + 2] == b"\r\n"
            self.outcome.client += data[:end]
            data = data[end + 2 :]

    def _fault(self) -> None:
        self.outcome.faults += 1
        if self.connection is not None:
            self.connection.abort()

    def began(self, answer: Answer) -> None:
        assert answer.is_event_stream

    def received(self, data: bytes) -> None:
        self.relay.feed(data)

    def answered(self, answer: Answer, body: bytes) -> None:
        raise AssertionError("it is no JSON")

    def ended(self) -> None:
        self.relay.end()

    def stale(self) -> None:
        raise AssertionError("it is new")

    def broke(self, error: EngineBroke) -> None:
        raise AssertionError(error)

    def result(self) -> Outcome:
        told, outcome = self.told, self.outcome
        self.relay.count()
        outcome.known = [told.finished, told.done, told.fault, told.usage_sent, self.record.usage]
        told.roll_back()
        outcome.known += [told.text, told.token_ids, told.num_tokens, told.is_exact, told.blocked]
        outcome.known += [told.reasoned, told.prompt_token_ids()]
        return outcome


def read(bodies: Sequence[bytes], *, hides_ids: bool) -> Outcome:
    """Every event read as it comes: what all else is compared with."""
    stream = Stream(hides_ids=hides_ids, max_unread=0, takes_chunks=False)
    for body in bodies:
        if not stream.outcome.faults:
            stream.relay.feed(body)
    return stream.result()


def passed_on(pieces: Sequence[bytes], *, hides_ids: bool, max_unread: int) -> Outcome:
    """The answer through an engine's connection, in these reads."""
    stream = Stream(hides_ids=hides_ids, max_unread=max_unread, takes_chunks=True)
    connection = EngineConnection("engine", lambda _: None, AnswerCache())
    stream.connection = connection
    connection.connection_made(EnginePipe())
    connection.ask(b"", b"", stream)
    for piece in pieces:
        if not connection.closed:
            connection.data_received(piece)
    return stream.result()


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(ends)]


def in_chunks(bodies: Sequence[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"


HEAD = EVENTS + b"transfer-encoding: chunked\r\n\r\n"
Write = Callable[[Event], bytes]


def compact(event: Event) -> bytes:
    text = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + text.encode() + b"\n\n"


def spaced(event: Event) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """The events of an answer, and the reads in which it comes."""
    write: Write = draw(st.sampled_from([compact, spaced]))
    said = [FIRST, *draw(st.lists(events, max_size=12)), *draw(endings)]
    bodies = [*(write(event) for event in said), b"data: [DONE]\n\n"]
    parts = [bodies[0]]  # HTTP's chunks: one event each, or several
    for body in bodies[1:]:
        if draw(st.integers(0, 4)):
            parts.append(body)
        else:
            parts[-1] += body
    if draw(st.booleans()):  # as engines flush them
        return bodies, [HEAD, *(in_chunks([part])[:-5] for part in parts), b"0\r\n\r\n"]
    places = st.lists(st.integers(0, 10_000), max_size=6)
    return bodies, [HEAD, *cut(in_chunks(parts), draw(places))]


@settings(max_examples=300, deadline=None)
@given(streams(), st.booleans(), st.sampled_from([0, 1, 3, 1000]))
def test_chunks_passed_on_as_they_came_are_the_stream_that_was_read(
    stream: tuple[list[bytes], list[bytes]], hides_ids: bool, max_unread: int
) -> None:
    bodies, reads = stream

    outcome = passed_on(reads, hides_ids=hides_ids, max_unread=max_unread)

    assert outcome == read(bodies, hides_ids=hides_ids)


@pytest.mark.parametrize("hides_ids", [False, True])
def test_what_is_plain_is_not_copied_and_not_read(*, hides_ids: bool) -> None:
    """Or else the test above would compare the long way with itself."""
    bodies = [compact(event) for event in [FIRST, chunk("a", [1]), *[chunk("b", [2, 3])] * 4]]
    sizes: list[int] = []
    stream = Stream(hides_ids=hides_ids, max_unread=1000, takes_chunks=False)
    for body in bodies[:2]:
        stream.relay.feed(body)
    stream.relay.write_chunks = lambda data: sizes.append(len(data))
    stream.relay.feed(bodies[2])
    several = in_chunks(bodies[3:])

    rest = stream.relay.feed_chunks(several)

    assert rest == b"0\r\n\r\n"
    removed = len(b"[2,3]") - len(b"null") if hides_ids else 0
    assert sizes == [len(in_chunks([body])) - 5 - removed for body in bodies[3:]]
    assert stream.told.token_ids == [1, 2, 3, 2, 3, 2, 3, 2, 3]


@pytest.mark.parametrize(
    "damaged",
    [
        b"5x\r\n",
        b"+5f\r\n",
        b" 5f\r\n",
        b"0x5f\r\n",
        b"5_f\r\n",
        b"05f\r\n",
        b"5f;x\r\n",
        b"5f\n",
        b"5F\r\n",
    ],
)
def test_only_a_plain_size_is_taken_as_it_came(damaged: bytes) -> None:
    stream = Stream(hides_ids=False, max_unread=1000, takes_chunks=False)
    stream.relay.feed(compact(FIRST))
    stream.relay.write_chunks = lambda _: pytest.fail("it was passed on")
    stream.relay.feed(compact(chunk("a")))
    data = damaged + b"data: " + b"x" * (0x5F - 8) + b"\n\n\r\n"

    assert stream.relay.feed_chunks(data) == data
