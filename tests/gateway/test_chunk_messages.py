from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.chunk_messages import ChunkMessages
from gateway.proto import inference_pb2 as pb

TEXTS = st.text() | st.sampled_from(
    ['"', "\\", '\\"content":"', '", "content": "', "}]}", "\ud800"]
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.just("assistant"),
        "content": TEXTS | st.none() | st.just([{"type": "text", "text": "x"}]),
        "reasoning_content": TEXTS,
        "text": TEXTS,
        "tool_calls": st.just([{"index": 0, "function": {"arguments": '{"content": "x"}'}}]),
    },
)


@st.composite
def chunks(draw: st.DrawFn) -> dict[str, Any]:
    choice = {"index": draw(st.integers(0, 1)), "delta": draw(FIELDS), "text": draw(TEXTS)}
    if draw(st.booleans()):
        choice["logprobs"] = {"content": [{"token": draw(TEXTS)}]}
    choices = [choice] * draw(st.integers(0, 2))
    return {"id": "c", "created": 1, "model": "m", "choices": choices}


def written(chunk: dict[str, Any], *, spaced: bool, is_ascii: bool) -> bytes:
    separators = None if spaced else (",", ":")
    return json.dumps(chunk, separators=separators, ensure_ascii=is_ascii).encode(errors="replace")


def plain(text: str) -> dict[str, Any]:
    """As most chunks are."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    return {"id": "c", "created": 1, "model": "m", "choices": [choice]}


@given(
    st.lists(chunks() | TEXTS.map(plain), max_size=12),
    st.booleans(),
    st.booleans(),
    st.sampled_from([pb.ChatCompletionChunk, pb.CompletionResponse]),
)
def test_a_chunk_becomes_the_same_message_whatever_came_before_it(
    stream: list[dict[str, Any]], spaced: bool, is_ascii: bool, form: Any
) -> None:
    messages = ChunkMessages(form)
    for chunk in stream:
        data = written(chunk, spaced=spaced, is_ascii=is_ascii)
        said, alone = form(), form()
        said.ParseFromString(messages.message(data))
        alone.ParseFromString(ChunkMessages(form).message(data))
        assert said == alone


def test_most_chunks_are_made_without_their_json_being_parsed() -> None:
    messages = ChunkMessages(pb.ChatCompletionChunk)
    messages.message(written(plain("a"), spaced=True, is_ascii=True))
    second = written(plain("b"), spaced=True, is_ascii=True)

    made = pb.ChatCompletionChunk.FromString(messages.message(second))

    assert made.choices[0].delta.content == "b"
    assert messages._head + b"b" + messages._tail == second
