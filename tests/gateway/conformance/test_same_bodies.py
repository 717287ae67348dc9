"""The same request to an engine and through the gateway has the same answer, event by event."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest
from PIL import Image

from tests.gateway.conformance.conftest import Fleet
from tests.gateway.conformance.engines import Running
from tests.gateway.conformance.wire import Told, ask, regrouped

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
EMBEDDINGS = "/v1/embeddings"

ASKED = [{"role": "user", "content": "What is the bora?"}]
TALK = [
    {"role": "system", "content": "You are brief. \u00e9\u4e16 \U0001f32c"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Go on."},
]
LONG_INPUT = [
    {"type": "message", "role": "user", "content": text} for text in ("Hi", "Go on. \U0001f32c")
]
GREEDY = {"max_tokens": 12, "temperature": 0}
OBJECT = {
    "type": "object",
    "properties": {"knots": {"type": "integer"}, "cold": {"type": "boolean"}},
    "required": ["knots", "cold"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "wind", "schema": OBJECT, "strict": True}}
FUNCTION = {"name": "measure", "description": "Wind speed.", "parameters": OBJECT}
TOOLS = [{"type": "function", "function": FUNCTION}]
NAMED = {"type": "function", "function": {"name": "measure"}}
LISTED = {"type": "function", **FUNCTION}
ANTHROPIC_TOOLS = [{"name": "measure", "description": "Wind speed.", "input_schema": OBJECT}]
STREAM = {"stream": True}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
JSON = {"response_format": {"type": "json_object"}}


def image() -> dict[str, Any]:
    png = io.BytesIO()
    Image.new("RGB", (56, 84), "red").save(png, "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def chat(**changes: Any) -> dict[str, Any]:
    return {"messages": ASKED, **GREEDY, **changes}


def text(**changes: Any) -> dict[str, Any]:
    return {"prompt": "The bora blows", **GREEDY, **changes}


def response(**changes: Any) -> dict[str, Any]:
    return {"input": "What is the bora?", "temperature": 0, "max_output_tokens": 12, **changes}


SAME: Mapping[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, chat()),
    "a talk in many alphabets": (CHAT, chat(messages=TALK)),
    "seeded": (CHAT, chat(temperature=0.8, seed=7, top_p=0.9)),
    "two choices": (CHAT, chat(temperature=0.8, seed=7, n=2)),
    "logprobs": (CHAT, chat(logprobs=True, top_logprobs=3, max_tokens=4)),
    "stop strings": (CHAT, chat(stop=["e", "t", "1"], max_tokens=60)),
    "penalties": (CHAT, chat(frequency_penalty=0.5, presence_penalty=0.5)),
    "tools": (CHAT, chat(tools=TOOLS)),
    "tools that must be used": (CHAT, chat(tools=TOOLS, tool_choice="required", max_tokens=80)),
    "one tool that must be used": (CHAT, chat(tools=TOOLS, tool_choice=NAMED, max_tokens=80)),
    "no tool": (CHAT, chat(tools=TOOLS, tool_choice="none")),
    "a schema": (CHAT, chat(response_format=SCHEMA, max_tokens=80)),
    "JSON": (CHAT, chat(**JSON, max_tokens=20)),
    "an image": (CHAT, chat(messages=[{"role": "user", "content": [image()]}])),
    "a chat as events": (CHAT, chat(**STREAM)),
    "a chat as events with usage": (CHAT, chat(**WITH_USAGE)),
    "logprobs as events": (CHAT, chat(**STREAM, logprobs=True, top_logprobs=2, max_tokens=4)),
    "a schema as events": (CHAT, chat(**STREAM, response_format=SCHEMA, max_tokens=80)),
    "a tool as events": (CHAT, chat(**STREAM, tools=TOOLS, tool_choice=NAMED, max_tokens=80)),
    "text": (TEXT, text()),
    "texts": (TEXT, text(prompt=["a", "b c"])),
    "text with logprobs": (TEXT, text(logprobs=2, max_tokens=3)),
    "text with an echo": (TEXT, text(echo=True)),
    "text as events with usage": (TEXT, text(**WITH_USAGE)),
    "tokens": (TEXT, text(prompt=[1, 104, 105])),
    "a response": (RESPONSES, response()),
    "a response to a talk": (RESPONSES, response(input=LONG_INPUT, instructions="Be brief.")),
    "a response by a schema": (
        RESPONSES,
        response(
            text={"format": {"type": "json_schema", "name": "wind", "schema": OBJECT}},
            max_output_tokens=80,
        ),
    ),
    "a response with tools": (RESPONSES, response(tools=[LISTED])),
    "a response as events": (RESPONSES, response(**STREAM)),
    "messages": (MESSAGES, chat()),
    "messages with a system prompt": (MESSAGES, chat(system="Be brief.", stop_sequences=["zzz"])),
    "messages with tools": (MESSAGES, chat(tools=ANTHROPIC_TOOLS)),
    "messages as events": (MESSAGES, chat(**STREAM)),
    "a count": (f"{MESSAGES}/count_tokens", {"messages": ASKED}),
    "a count with tools": (
        f"{MESSAGES}/count_tokens",
        {"messages": ASKED, "tools": ANTHROPIC_TOOLS},
    ),
    "tokens of a text": ("/tokenize", {"prompt": "The bora", "content": "The bora"}),
    "text of tokens": ("/detokenize", {"tokens": [300, 301]}),
    # What engines refuse
    "no messages": (CHAT, {}),
    "messages of no kind": (CHAT, chat(messages=[{"role": "wind", "content": 3}])),
    "a temperature of no kind": (CHAT, chat(temperature="hot")),
    "a negative limit": (CHAT, chat(max_tokens=-5)),
    "too long a prompt": (TEXT, text(prompt="wind " * 9000)),
    "a tool that is not there": (
        CHAT,
        chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}}),
    ),
    "a schema that is none": (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}),
    ),
    "an image that is none": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ),
}
FAILS = {
    "vllm": {
        *("no messages", "messages of no kind", "a temperature of no kind", "a negative limit"),
        *("too long a prompt", "a tool that is not there", "a schema that is none"),
        "an image that is none",
    },
    "llamacpp": {
        *("an image", "no messages", "a temperature of no kind", "too long a prompt"),
        *("messages of no kind", "a negative limit", "an image that is none"),
    },
}

# What llama.cpp says otherwise is translated (gateway.llamacpp_dialect).
IN_VLLMS_WORDS = {"an image", "an image that is none", "tokens of a text", "text of tokens"}


async def both(fleet: Fleet, engine: Running, path: str, body: dict[str, Any]) -> tuple[Told, Told]:
    body = {"model": engine.model, **body}
    if engine.kind == "llamacpp":
        body["cache_prompt"] = False  # a cached prompt is computed in other batches
    async with aiohttp.ClientSession() as session:
        own = await ask(session, engine.url + path, body, key=engine.api_key)
        through = await ask(session, fleet.url + path, body)
    return own, through


@pytest.mark.parametrize("name", SAME)
async def test_the_answer_is_the_engines_own(fleet: Fleet, engine: Running, name: str) -> None:
    path, body = SAME[name]

    own, through = await both(fleet, engine, path, body)

    if isinstance(own.body, list) and engine.kind == "vllm":
        assert regrouped(through.body) == regrouped(own.body)
        assert (through.status, through.content_type) == (own.status, own.content_type)
    elif engine.kind == "llamacpp" and name in IN_VLLMS_WORDS:
        assert through.status == (400 if own.status == 500 else own.status)
        assert (own.body.get("error") or own.body).keys() <= (
            through.body.get("error") or through.body
        ).keys()
    else:
        assert through == own
    assert (own.status >= 400) == (name in FAILS[engine.kind]), own
    assert isinstance(own.body, list) == bool(body.get("stream"))


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_vectors_are_the_engines_own(fleet: Fleet, form: str) -> None:
    body = {"input": ["The bora", "blows"], "encoding_format": form}

    own, through = await both(fleet, fleet.engines["llamacpp"], EMBEDDINGS, body)

    assert through == own
    assert len(own.body["data"]) == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (EMBEDDINGS, {"input": ["The bora", "blows"]}),
        (EMBEDDINGS, {"input": "The bora", "encoding_format": "base64"}),
        (EMBEDDINGS, {"input": [1, 104, 105]}),
        ("/pooling", {"input": "The bora"}),
        ("/v1/score", {"text_1": "wind", "text_2": ["bora", "calm"]}),
        ("/score", {"text_1": "wind", "text_2": "bora"}),
        ("/v1/rerank", {"query": "wind", "documents": ["bora", "calm"], "top_n": 1}),
        ("/rerank", {"query": "wind", "documents": ["bora", "calm"]}),
        ("/tokenize", {"prompt": "The bora"}),
    ],
)
async def test_what_vllm_makes_of_texts_is_its_own(
    fleet: Fleet, path: str, body: dict[str, Any]
) -> None:
    own, through = await both(fleet, fleet.engines["vectors"], path, body)

    assert through == own
    assert own.status == 200


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("vectors", CHAT),
        ("vectors", RESPONSES),
        ("vectors", MESSAGES),
        ("vectors", "/classify"),
        ("vllm", EMBEDDINGS),
        ("vllm", "/v1/rerank"),
        ("vllm", "/v1/score"),
        ("vllm", f"{RESPONSES}/input_tokens"),
        ("llamacpp", "/v1/score"),
        ("llamacpp", "/classify"),
    ],
)
async def test_a_path_that_an_engine_lacks_is_told_clearly(
    fleet: Fleet, kind: str, path: str
) -> None:
    engine = fleet.engines[kind]
    own, through = await both(fleet, engine, path, {"input": "hi", "query": "a", "documents": []})

    assert own.status in {404, 405}
    assert through.status == 404
    assert through.body["error"]["code"] == "endpoint_not_supported"
    assert path in through.body["error"]["message"]
