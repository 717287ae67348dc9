"""The official clients against the gateway, in front of real engines."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pydantic
import pytest
from PIL import Image

from tests.gateway.conformance.conftest import Fleet
from tests.gateway.conformance.engines import Running

pytestmark = pytest.mark.engine

HI: list[Any] = [{"role": "user", "content": "What is the bora?"}]
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
# Anthropic's client knows no temperature; engines do.
BRIEF: dict[str, Any] = {"max_tokens": 12, "extra_body": {"temperature": 0}}


class Wind(pydantic.BaseModel):
    knots: int
    cold: bool


@contextmanager
def an_openai(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@asynccontextmanager
async def an_async_openai(fleet: Fleet) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{fleet.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
        yield client


@asynccontextmanager
async def an_async_anthropic(fleet: Fleet) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=fleet.url, api_key="any", max_retries=0) as client:
        yield client


async def test_chat_at_once_and_as_a_stream(fleet: Fleet, engine: Running) -> None:
    async with an_async_openai(fleet) as client:
        chats = client.chat.completions
        whole = await chats.create(model=engine.model, messages=HI, **GREEDY)
        stream = await chats.create(
            model=engine.model,
            messages=HI,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
        chunks = [chunk async for chunk in stream]

    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.model == chunks[0].model == engine.model


def test_the_synchronous_clients_say_the_same(fleet: Fleet, engine: Running) -> None:
    with an_openai(fleet) as client:
        whole = client.chat.completions.create(model=engine.model, messages=HI, **GREEDY)
        with client.chat.completions.create(
            model=engine.model, messages=HI, stream=True, **GREEDY
        ) as stream:
            parts = [chunk.choices[0].delta.content or "" for chunk in stream]
        text = client.completions.create(model=engine.model, prompt="Hi", **GREEDY)
        pieces = client.completions.create(model=engine.model, prompt="Hi", stream=True, **GREEDY)

        assert "".join(parts) == whole.choices[0].message.content
        assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text

    with anthropic.Anthropic(base_url=fleet.url, api_key="any", max_retries=0) as claude:
        message = claude.messages.create(model=engine.model, messages=HI, **BRIEF)
        with claude.messages.stream(model=engine.model, messages=HI, **BRIEF) as events:
            told = "".join(events.text_stream)
            final = events.get_final_message()

    assert isinstance(message.content[0], anthropic.types.TextBlock)
    assert told == message.content[0].text
    assert final.usage.output_tokens == message.usage.output_tokens == 12


async def test_an_alias_is_as_good_as_the_name(fleet: Fleet, engine: Running) -> None:
    async with an_async_openai(fleet) as client:
        by_name, by_alias = [
            await client.chat.completions.create(model=name, messages=HI, **GREEDY)
            for name in (engine.model, f"{engine.model}-alias")
        ]
        models = {model.id async for model in client.models.list()}
        card = await client.models.retrieve(f"{engine.model}-alias")

    assert by_alias.choices == by_name.choices
    assert models == {other.model for other in fleet.engines.values()}
    assert card.id == engine.model


async def test_the_answer_has_the_form_that_was_asked_for(fleet: Fleet, engine: Running) -> None:
    async with an_async_openai(fleet) as client:
        parsed = await client.chat.completions.parse(
            model=engine.model,
            messages=HI,
            response_format=Wind,
            temperature=0,
            max_tokens=200,
        )

    assert parsed.choices[0].finish_reason == "stop"
    assert isinstance(parsed.choices[0].message.parsed, Wind)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called(fleet: Fleet, stream: bool) -> None:
    tool: Any = openai.pydantic_function_tool(Wind, name="measure")
    named: Any = {"type": "function", "function": {"name": "measure"}}
    asked: dict[str, Any] = {
        "model": "chat",
        "messages": HI,
        "tools": [tool],
        "tool_choice": named,
        "temperature": 0,
        "max_tokens": 200,
    }
    async with an_async_openai(fleet) as client:
        if stream:
            async with client.chat.completions.stream(**asked) as events:
                completion: Any = await events.get_final_completion()
        else:
            completion = await client.chat.completions.create(**asked)

    [call] = completion.choices[0].message.tool_calls
    assert call.function.name == "measure"
    Wind.model_validate_json(call.function.arguments)


async def test_choices_logprobs_and_stop_strings(fleet: Fleet, engine: Running) -> None:
    async with an_async_openai(fleet) as client:
        asked: dict[str, Any] = {"model": engine.model, "messages": HI}
        two = await client.chat.completions.create(**asked, n=2, seed=7, max_tokens=8)
        told = await client.chat.completions.create(
            **asked, **GREEDY, logprobs=True, top_logprobs=2
        )
        whole = await client.chat.completions.create(**asked, **GREEDY)
        text = whole.choices[0].message.content or ""
        stopped = await client.chat.completions.create(**asked, **GREEDY, stop=[text[4:6]])

    assert [choice.index for choice in two.choices] == [0, 1]
    logprobs = told.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert 8 <= len(logprobs.content) <= 12  # llama.cpp leaves out what is half a character
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == text[: text.index(text[4:6])]


async def test_a_model_that_sees_gets_the_image_and_another_says_that_it_cannot(
    fleet: Fleet,
) -> None:
    async def described(client: openai.AsyncOpenAI, model: str, color: str) -> str | None:
        image: Any = {"type": "image_url", "image_url": {"url": a_picture(color)}}
        completion = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": [image]}], **GREEDY
        )
        return completion.choices[0].message.content

    async with an_async_openai(fleet) as client:
        red, blue = [await described(client, "chat", color) for color in ("red", "blue")]
        with pytest.raises(openai.APIStatusError, match="image input is not supported") as refused:
            await described(client, "llama", "red")

    assert red != blue
    assert refused.value.status_code == 400  # llama.cpp's own is 500


def a_picture(color: str) -> str:
    png = io.BytesIO()
    Image.new("RGB", (56, 84), color).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_found_and_followed_up(fleet: Fleet, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "chat", "temperature": 0, "max_output_tokens": 8}
    async with an_async_openai(fleet) as client:
        if stream:
            async with client.responses.stream(input="Hi", **asked) as events:
                first: Any = await events.get_final_response()
        else:
            first = await client.responses.create(input="Hi", **asked)
        found = await client.responses.retrieve(first.id)
        more = await client.responses.create(input="Go on.", previous_response_id=first.id, **asked)
        unrelated = await client.responses.create(input="Go on.", **asked)
        with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous"):
            await client.responses.cancel(first.id)
        with pytest.raises(openai.NotFoundError, match="no engine is known to hold"):
            await client.responses.retrieve("resp_never")
        with pytest.raises(openai.NotFoundError, match=r"has no /v1/responses"):
            await client.responses.delete(first.id)

    assert found.output_text == first.output_text != ""
    assert more.previous_response_id == first.id
    assert more.usage is not None
    assert unrelated.usage is not None
    assert more.usage.input_tokens > unrelated.usage.input_tokens


async def test_a_response_in_the_background_is_waited_for_and_cancelled(fleet: Fleet) -> None:
    asked: dict[str, Any] = {"model": "chat", "input": "Hi", "background": True, "store": True}
    async with an_async_openai(fleet) as client:
        short = await client.responses.create(**asked, max_output_tokens=4)
        while short.status in {"queued", "in_progress"}:
            short = await client.responses.retrieve(short.id)
        long = await client.responses.create(**asked, max_output_tokens=7000)
        cancelled = await client.responses.cancel(long.id)

    assert short.output_text
    assert cancelled.status == "cancelled"


async def test_a_response_of_an_engine_that_stores_none(fleet: Fleet) -> None:
    async with an_async_openai(fleet) as client:
        first = await client.responses.create(model="llama", input="Hi", max_output_tokens=4)
        with pytest.raises(openai.BadRequestError, match="does not support 'previous_response_id'"):
            await client.responses.create(
                model="llama", input="Hi", previous_response_id=first.id, max_output_tokens=4
            )
        with pytest.raises(openai.NotFoundError, match="has no /v1/responses"):
            await client.responses.retrieve(first.id)

    assert first.output_text


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("model", ["vectors", "llama"])
async def test_texts_become_vectors_where_the_engine_has_them(
    fleet: Fleet, model: str, form: Any
) -> None:
    async with an_async_openai(fleet) as client:
        told = await client.embeddings.create(model=model, input=["a", "b"], encoding_format=form)
        with pytest.raises(openai.NotFoundError, match="has no /v1/embeddings") as refused:
            await client.embeddings.create(model="chat", input="a", encoding_format=form)

    assert len(told.data) == 2
    assert told.data[0].embedding != told.data[1].embedding
    assert refused.value.code == "endpoint_not_supported"


async def test_anthropics_messages(fleet: Fleet, engine: Running) -> None:
    async with an_async_anthropic(fleet) as client:
        message = await client.messages.create(
            model=engine.model, messages=HI, system="Be brief.", **BRIEF
        )
        async with client.messages.stream(
            model=engine.model, messages=HI, system="Be brief.", **BRIEF
        ) as stream:
            told = "".join([text async for text in stream.text_stream])
        count = await client.messages.count_tokens(
            model=engine.model, messages=HI, system="Be brief."
        )

    [block] = message.content
    assert isinstance(block, anthropic.types.TextBlock)
    assert told == block.text
    assert message.stop_reason == "max_tokens"
    read = message.usage.cache_read_input_tokens or 0
    assert count.input_tokens == message.usage.input_tokens + read


async def test_text_becomes_tokens_and_text_again(fleet: Fleet) -> None:
    async with httpx.AsyncClient(base_url=fleet.url) as client:
        for model, name in (("chat", "prompt"), ("llama", "content")):
            asked = {"model": model, "prompt": "The bora", "content": "The bora"}
            tokens = (await client.post("/tokenize", json=asked)).json()["tokens"]
            back = await client.post("/detokenize", json={"model": model, "tokens": tokens})
            assert "bora" in back.json()[name]


async def test_mistakes_are_the_clients_errors(fleet: Fleet, engine: Running) -> None:
    async with an_async_openai(fleet) as client:
        chats = client.chat.completions
        with pytest.raises(openai.NotFoundError, match="'nope' does not exist") as unknown:
            await chats.create(model="nope", messages=HI)
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="max_tokens"):
                await chats.create(model=engine.model, messages=HI, max_tokens=-5, stream=stream)
    async with an_async_anthropic(fleet) as claude:
        with pytest.raises(anthropic.NotFoundError, match="'nope' does not exist"):
            await claude.messages.create(model="nope", messages=HI, max_tokens=1)

    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"


async def test_a_deadline_is_told_and_the_engine_stops(fleet: Fleet) -> None:
    async with an_async_openai(fleet) as client:
        with pytest.raises(openai.APIStatusError) as ended:
            await client.chat.completions.create(
                model="chat",
                messages=HI,
                max_tokens=7000,
                extra_headers={"x-request-timeout-s": "0.3"},
            )
        engine = fleet.engines["vllm"]
        async with httpx.AsyncClient() as direct:
            async with asyncio.timeout(15):
                while await num_running(direct, engine):
                    await asyncio.sleep(0.05)

    assert ended.value.status_code == 504
    assert json.loads(ended.value.response.text)["error"]["code"] == "deadline_exceeded"


async def num_running(client: httpx.AsyncClient, engine: Running) -> float:
    lines = (await client.get(f"{engine.url}/metrics")).text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:num_requests_running"))
