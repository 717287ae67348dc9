import json
import math
from typing import Any

import pytest

from loadtests.sse import Event
from loadtests.stream_check import Question, Seen, compare, percentile, read_chunks, read_events

CHAT = Question(
    chat=True, body={"model": "chat", "stream_options": {"include_usage": True}, "stream": True}
)
COMPLETION = Question(chat=False, body={"model": "chat", "return_token_ids": True})


def a_chunk(*choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "x", "created": 1, "model": "chat", "choices": list(choices), **more}


def a_chat_stream(*texts: str, finish_reason: str = "stop") -> list[dict[str, Any]]:
    said = [a_chunk({"index": 0, "delta": {"content": text}}) for text in texts]
    said[-1]["choices"][0]["finish_reason"] = finish_reason
    usage = {"prompt_tokens": 3, "completion_tokens": len(texts), "total_tokens": 3 + len(texts)}
    opening = a_chunk({"index": 0, "delta": {"role": "assistant", "content": ""}})
    return [opening, *said, a_chunk(usage=usage)]


def events(chunks: list[dict[str, Any]], *tail: str) -> list[Event]:
    return [*(Event(json.dumps(chunk)) for chunk in chunks), *map(Event, tail or ("[DONE]",))]


def test_whole_stream_has_no_problems() -> None:
    seen = read_events(events(a_chat_stream("The", " wind")), CHAT)

    assert (seen.text, seen.finish_reason, seen.usage) == ("The wind", "stop", (3, 2))
    assert seen.problems == []
    assert compare(seen, seen).problems == ()


@pytest.mark.parametrize(
    ("tail", "problem"),
    [
        (("[DONE]", "[DONE]"), "2 end marks"),
        (("[DONE]", json.dumps(a_chunk())), "not the last event"),
        (('{"id": "x', "[DONE]"), "an event is not JSON"),
        (('{"error": {"message": "broke"}}', "[DONE]"), "error event"),
    ],
)
def test_malformed_end_is_a_problem(tail: tuple[str, ...], problem: str) -> None:
    seen = read_events(events(a_chat_stream("The"), *tail), CHAT)

    assert any(problem in one for one in seen.problems)


def test_stream_that_broke_off_has_no_end_mark_no_finish_reason_and_no_usage() -> None:
    stream = [Event(json.dumps(chunk)) for chunk in a_chat_stream("The", " wind", " blows")[:3]]

    seen = read_events(stream, CHAT)

    assert seen.problems == ["0 end marks", "no finish_reason", "no usage"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c[2].update(id="y"), "id changes within the stream"),
        (lambda c: c[3].update(model="other"), "model changes"),
        (lambda c: c.insert(2, c[0]), "2 events give the role"),
        (lambda c: c.pop(0), "0 events give the role"),
        (lambda c: c.insert(3, c[1]), "after the one with finish_reason"),
        (lambda c: c[1].update(usage={"prompt_tokens": 1}), "usage outside of the last event"),
        (lambda c: c[1]["choices"][0].update(token_ids=[5]), "token ids that nobody asked for"),
        (lambda c: c[-1]["usage"].update(total_tokens=99), "does not add up"),
        (lambda c: [one.update(model="served") for one in c], "model is 'served'"),
    ],
)
def test_malformed_stream_is_a_problem(change: Any, problem: str) -> None:
    chunks = a_chat_stream("The", " wind")
    change(chunks)

    assert any(problem in one for one in read_chunks(chunks, CHAT).problems)


def test_usage_that_nobody_asked_for_is_a_problem() -> None:
    quiet = Question(chat=True, body={"model": "chat"})

    assert read_chunks(a_chat_stream("a"), quiet).problems == ["usage that nobody asked for"]


def test_token_ids_are_read_where_they_were_asked_for() -> None:
    first = {"text": "", "token_ids": [1], "prompt_token_ids": [7, 8]}
    last = {"text": "é", "token_ids": [2], "prompt_token_ids": None, "finish_reason": "length"}

    seen = read_chunks([a_chunk(first), a_chunk(last)], COMPLETION)

    assert (seen.text, seen.token_ids, seen.prompt_token_ids) == ("é", [1, 2], [7, 8])
    assert seen.problems == []
    again = read_chunks([a_chunk(first), a_chunk(first), a_chunk(last)], COMPLETION)
    assert again.problems == ["prompt_token_ids outside of the first event"]


def said(text: str, **changes: Any) -> Seen:
    return Seen(**{"text": text, "finish_reason": "stop", "usage": (3, 4), **changes})


@pytest.mark.parametrize(
    ("text", "duplicated", "missing"),
    [
        ("the wind blows west", 0, 0),
        ("the wind", 0, 2),
        ("the wind bl", 0, 2),
        ("", 0, 4),
        ("the wind wind blows west", 1, 0),
        ("the blows west", 0, 1),
        ("the wind blows west west now", 2, 0),
        ("the wind sinks west", 1, 1),
    ],
)
def test_tokens_too_many_and_missing_are_counted(text: str, duplicated: int, missing: int) -> None:
    verdict = compare(said(text), said("the wind blows west"))

    assert (verdict.duplicated_tokens, verdict.missing_tokens) == (duplicated, missing)
    assert bool(verdict.problems) == bool(duplicated or missing)


@pytest.mark.parametrize(
    "change",
    [
        {"finish_reason": "length"},
        {"usage": (3, 5)},
        {"usage": None},
        {"stop_reason": "moon"},
        {"token_ids": [1, 2]},
        {"prompt_token_ids": [1]},
        {"problems": ["2 end marks"]},
    ],
)
def test_equal_text_is_not_enough(change: dict[str, Any]) -> None:
    [problem] = compare(said("calm", **change), said("calm")).problems

    assert problem


def test_doubled_token_id_counts_even_where_it_has_no_text() -> None:
    verdict = compare(said("é", token_ids=[1, 1, 2]), said("é", token_ids=[1, 2]))

    assert verdict.duplicated_tokens == 1


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0, 0.5, 0.99, 1)] == [1, 2, 3, 3]
    assert math.isnan(percentile([], 0.5))
