import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.sse import DONE, Event, EventReader, StreamRecord, answer_failure


def a_chunk(content: str = "", finish_reason: str | None = None) -> Event:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}
    return Event(json.dumps({"choices": [choice]}))


def a_record(*events: Event) -> StreamRecord:
    """A stream sent at 10.0 s, whose events arrive at 11.0 s, 12.0 s ..."""
    record = StreamRecord(start_s=10.0)
    for arrival, event in enumerate(events, 11):
        record.observe(event, float(arrival))
    return record


def read(*chunks: bytes) -> list[Event]:
    reader = EventReader()
    return [event for chunk in chunks for event in reader.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [Event("a")]),
        (b"data:a\r\n\r\n", [Event("a")]),
        (b": comment\n\ndata: a\n\n", [Event("a")]),
        (b"event: error\ndata: a\n\ndata: b\n\n", [Event("a", "error"), Event("b")]),
        (b"id: 1\ndata: a\ndata: b\n\n", [Event("a\nb")]),
        (b"data: unfinished\n", []),
    ],
)
def test_events_are_read_as_the_standard_says(stream: bytes, events: list[Event]) -> None:
    assert read(stream) == events


@given(st.lists(st.integers(0, 60)))
def test_events_do_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    stream = "data: é1\r\n\r\n: ping\n\nevent: error\ndata: 2\ndata: 3\n\ndata: 4\n\n".encode()
    bounds = [0, *sorted(cuts), len(stream)]

    pieces = [stream[start:end] for start, end in pairwise(bounds)]

    assert read(*pieces) == [Event("é1"), Event("2\n3", "error"), Event("4")]


def test_first_content_is_ttft_and_further_content_is_itl() -> None:
    role = Event('{"choices": [{"delta": {"role": "assistant", "content": ""}}]}')
    usage = Event('{"choices": [], "usage": {"total_tokens": 3}}')

    record = a_record(role, a_chunk("a"), a_chunk("b"), a_chunk("", "stop"), usage, Event(DONE))

    assert record.ttft_s == 2.0
    assert record.itl_s == [1.0]
    assert record.failure is None


def test_text_reasoning_and_tool_calls_are_content_too() -> None:
    record = a_record(
        Event('{"choices": [{"text": "a"}]}'),
        Event('{"choices": [{"delta": {"reasoning_content": "b"}}]}'),
        Event('{"choices": [{"delta": {"tool_calls": [{"index": 0}]}, "finish_reason": "x"}]}'),
    )

    assert (record.ttft_s, len(record.itl_s)) == (1.0, 2)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "without any content"),
        ([a_chunk("", "stop"), Event(DONE)], "without any content"),
        ([a_chunk("a"), Event(DONE)], "without finish_reason"),
        ([a_chunk("a", "stop")], "without [DONE]"),
        ([a_chunk("a"), Event('{"error": {"message": "died"}}'), Event(DONE)], "died"),
        ([a_chunk("a"), Event('{"message": "died"}', "error")], "died"),
        ([a_chunk("a"), Event("oops"), a_chunk("b", "stop"), Event(DONE)], "not JSON: oops"),
    ],
)
def test_stream_that_is_not_whole_is_a_failure(events: list[Event], words: str) -> None:
    assert words in (a_record(*events).failure or "")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"<html>", "not JSON"),
        (b"[]", "no choices"),
        (b'{"error": {"message": "overloaded"}}', "overloaded"),
        (b'{"choices": [{"text": "a"}]}', "no finish_reason"),
        (b'{"choices": [{"text": "", "finish_reason": "stop"}]}', "answer is empty"),
    ],
)
def test_answer_that_is_not_whole_is_a_failure(body: bytes, words: str) -> None:
    assert words in (answer_failure(body) or "")


@pytest.mark.parametrize("said", [{"text": "a"}, {"message": {"content": "a"}}])
def test_whole_answer_is_none(said: dict[str, object]) -> None:
    body = {"choices": [{**said, "finish_reason": "length"}]}

    assert answer_failure(json.dumps(body).encode()) is None
