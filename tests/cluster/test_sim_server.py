import asyncio
import io
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from cluster.engines.adapter import EngineLoad
from cluster.engines.sim import SimEngine
from cluster.engines.sim_batch import Limits, Timing
from cluster.engines.sim_server import Settings, SimulatedEngine

MESSAGES = [{"role": "user", "content": "What does the wind do to the sea?"}]


def settings(**changes: int) -> Settings:
    limits = Limits(
        **{
            "max_num_seqs": 8,
            "max_num_batched_tokens": 1000,
            "kv_cache_tokens": 20_000,
            "max_model_len": 2000,
        }
        | changes
    )
    timing = Timing(1000.0, tpot_ms=1.0, tpot_ms_at_max=2.0, max_num_seqs=limits.max_num_seqs)
    return Settings("chat", limits, timing, speed=10.0)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    engine = SimulatedEngine(settings)
    runner = web.AppRunner(engine.application(), handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    clock = asyncio.create_task(engine.run())
    try:
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield session
    finally:
        clock.cancel()
        with suppress(asyncio.CancelledError):
            await clock
        await runner.cleanup()


async def ask(
    session: aiohttp.ClientSession,
    path: str = "/v1/chat/completions",
    *,
    expect: int = 200,
    headers: dict[str, str] | None = None,
    **body: Any,
) -> Any:
    async with session.post(path, json=body, headers=headers) as response:
        assert response.status == expect, await response.text()
        if response.content_type == "application/json":
            return await response.json()
        events = [event for event in (await response.text()).split("\n\n") if event]
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


async def load(session: aiohttp.ClientSession) -> EngineLoad:
    async with session.get("/metrics") as response:
        return SimEngine().load(await response.text())


async def until(session: aiohttp.ClientSession, expected: EngineLoad) -> None:
    async with asyncio.timeout(60):
        while await load(session) != expected:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stop", [None, ["e a", " th"]])
async def test_stream_says_what_the_whole_answer_says(stop: list[str] | None) -> None:
    body = {"model": "chat", "messages": MESSAGES, "max_tokens": 300, "stop": stop}
    async with serving(settings()) as session:
        whole = await ask(session, **body)
        chunks = await ask(session, **body, stream=True, stream_options={"include_usage": True})

    *chunks, last = chunks
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(choice["delta"]["content"] for choice in choices)
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


async def test_broken_chat_stream_is_continued_by_another_engine() -> None:
    body = {"messages": MESSAGES, "max_tokens": 10, "ignore_eos": True}
    async with serving(settings()) as first, serving(settings()) as second:
        whole = (await ask(first, **body))["choices"][0]["message"]["content"]
        half = " ".join(whole.split(" ")[:4])
        body["messages"] = [*MESSAGES, {"role": "assistant", "content": half}]
        body |= {"continue_final_message": True, "add_generation_prompt": False, "max_tokens": 6}
        rest = (await ask(second, **body))["choices"][0]["message"]["content"]

    assert half + rest == whole


async def test_completions_stream_too_and_stop_at_16_tokens_by_default() -> None:
    body = {"prompt": "The harbour", "ignore_eos": True}
    async with serving(settings()) as session:
        whole = await ask(session, "/v1/completions", **body)
        chunks = await ask(session, "/v1/completions", **body, stream=True)

    choice = whole["choices"][0]
    assert (whole["usage"]["completion_tokens"], choice["finish_reason"]) == (16, "length")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat/completions", {"messages": MESSAGES, "n": 2}, 400, "n must be 1"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": MESSAGES, "model": "x"}, 404, "does not exist"),
        ("completions", {"prompt": "word " * 2000}, 400, "maximum context length is 2000"),
        ("completions", {"prompt": "a", "max_tokens": 2000}, 400, "maximum context length"),
        ("completions", {"prompt": ""}, 400, "cannot be empty"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"prompt": "a", "stream_options": {}}, 400, "stream=True"),
    ],
)
async def test_what_cannot_be_served_gets_an_openai_error(
    path: str, body: dict[str, Any], status: int, words: str
) -> None:
    async with serving(settings()) as session:
        error = (await ask(session, f"/v1/{path}", expect=status, **body))["error"]

    assert words in error["message"]
    assert error["code"] == status


async def test_body_that_is_not_json_is_400() -> None:
    async with (
        serving(settings()) as session,
        session.post("/v1/completions", data=b'{"prompt":') as response,
    ):
        assert response.status == 400
        assert "parsing the body" in (await response.json())["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("POST", "/v1/embeddings", 404, "NotFoundError"),
        ("GET", "/nowhere", 404, "NotFoundError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowedError"),
    ],
)
async def test_an_unknown_route_gets_an_openai_error(
    method: str, path: str, status: int, kind: str
) -> None:
    async with (
        serving(settings()) as session,
        session.request(method, path, json={}) as response,
    ):
        assert response.status == status
        error = (await response.json())["error"]

    assert (error["code"], error["type"], error["param"]) == (status, kind, None)
    assert path in error["message"]


async def test_an_oversized_body_gets_an_openai_error() -> None:
    async with (
        serving(settings()) as session,
        session.post("/v1/completions", data=io.BytesIO(b" " * (64 * 2**20 + 1))) as response,
    ):
        assert response.status == 413
        assert (await response.json())["error"]["code"] == 413


async def test_a_body_that_is_not_encoded_as_its_header_says_gets_an_openai_error() -> None:
    async with (
        serving(settings()) as session,
        session.post(
            "/v1/completions", data=b"plain", headers={"content-encoding": "gzip"}
        ) as response,
    ):
        assert response.status == 400
        assert (await response.json())["error"]["code"] == 400


async def test_openai_client_understands_that_embeddings_are_not_served() -> None:
    async with (
        serving(settings()) as session,
        openai.AsyncOpenAI(base_url=f"{session._base_url}/v1", api_key="none") as client,
    ):
        with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
            await client.embeddings.create(model="chat", input="wind")


async def test_api_key_guards_v1_only() -> None:
    base = settings()
    guarded = Settings("chat", base.limits, base.timing, speed=10.0, api_key="secret")
    async with serving(guarded) as session:
        await ask(session, expect=401, messages=MESSAGES)
        key = {"Authorization": "Bearer secret"}
        await ask(session, headers=key, messages=MESSAGES, max_tokens=1)
        async with session.get("/health") as response:
            assert response.status == 200


async def test_metrics_count_tokens_under_vllm_names() -> None:
    async with serving(settings()) as session:
        usage = (await ask(session, messages=MESSAGES, max_tokens=20))["usage"]
        async with session.get("/metrics") as response:
            text = await response.text()

    labels = '{engine="0",model_name="chat"}'
    assert f"vllm:prompt_tokens_total{labels} {usage['prompt_tokens']}.0" in text
    assert f"vllm:generation_tokens_total{labels} {usage['completion_tokens']}.0" in text
    assert f"vllm:time_to_first_token_seconds_count{labels} 1.0" in text
    assert SimEngine().load(text) == EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)


async def test_client_that_leaves_frees_its_slot_for_the_next() -> None:
    endless = {"prompt": "a", "max_tokens": 1999, "ignore_eos": True, "stream": True}
    never = Timing(1000.0, tpot_ms=1e6, tpot_ms_at_max=1e6, max_num_seqs=1)
    async with serving(Settings("chat", settings(max_num_seqs=1).limits, never)) as session:
        first = await session.post("/v1/completions", json=endless)
        await until(session, EngineLoad(running=1, waiting=0, kv_cache_usage=0.1))
        second = await session.post("/v1/completions", json=endless)
        await until(session, EngineLoad(running=1, waiting=1, kv_cache_usage=0.1))

        first.close()
        await until(session, EngineLoad(running=0, waiting=1, kv_cache_usage=0.0))
        second.close()
        await until(session, EngineLoad(running=0, waiting=0, kv_cache_usage=0.0))


async def test_waiting_request_gets_the_slot_of_a_client_that_left() -> None:
    endless = {"prompt": "a", "max_tokens": 1999, "ignore_eos": True, "stream": True}
    slow = Timing(1000.0, tpot_ms=20.0, tpot_ms_at_max=20.0, max_num_seqs=1)
    async with serving(Settings("chat", settings(max_num_seqs=1).limits, slow)) as session:
        first = await session.post("/v1/completions", json=endless)
        await first.content.readline()
        second = asyncio.create_task(ask(session, messages=MESSAGES, max_tokens=2))
        await until(session, EngineLoad(running=1, waiting=1, kv_cache_usage=0.1))

        first.close()

        assert (await second)["usage"]["completion_tokens"] == 2


async def test_tokenize_counts_as_usage_does() -> None:
    async with serving(settings()) as session:
        tokens = await ask(session, "/tokenize", model="chat", messages=MESSAGES)
        usage = (await ask(session, messages=MESSAGES, max_tokens=1))["usage"]

    assert tokens["count"] == len(tokens["tokens"]) == usage["prompt_tokens"]


async def test_openai_client_works() -> None:
    async with serving(settings()) as session:
        base_url = f"{session._base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:
            [model] = (await client.models.list()).data
            arguments = {"model": model.id, "messages": MESSAGES, "max_completion_tokens": 9}
            whole = await client.chat.completions.create(**arguments)
            stream = await client.chat.completions.create(**arguments, stream=True)
            text = "".join([chunk.choices[0].delta.content async for chunk in stream])
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="other", messages=MESSAGES)

    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 9


async def test_ids_of_a_broken_stream_continue_it_on_another_engine() -> None:
    asked = {"max_tokens": 60, "stream": True, "return_token_ids": True, "ignore_eos": True}
    async with serving(settings()) as first, serving(settings()) as second:
        opening, *events = await ask(first, messages=MESSAGES, **asked)
        ids = [one for event in events for one in event["choices"][0]["token_ids"]]
        text = "".join(event["choices"][0]["delta"]["content"] for event in events)
        for cut in (1, 7, 31, 59):
            body = {**asked, "prompt": opening["prompt_token_ids"] + ids[:cut]}
            rest = await ask(second, "/v1/completions", **body | {"max_tokens": 60 - cut})
            begun = "".join(event["choices"][0]["delta"]["content"] for event in events[:cut])
            more = "".join(event["choices"][0]["text"] for event in rest)
            assert begun + more == text
            assert [one for event in rest for one in event["choices"][0]["token_ids"]] == ids[cut:]

    assert len(ids) == 60


def lines_of(raw: str) -> list[str]:
    """Events with what differs from run to run made alike."""
    return [re.sub(r'"created":\d+', '"created":1', line) for line in raw.split("\n\n") if line]


async def raw_stream(path: str, **body: Any) -> list[str]:
    headers = {"X-Request-Id": "i"}
    async with (
        serving(settings()) as session,
        session.post(path, json={"stream": True, **body}, headers=headers) as response,
    ):
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return lines_of(await response.text())


async def test_chat_stream_has_vllms_bytes() -> None:
    """As vLLM 0.32's pydantic models write them, apart from the values."""
    body = {"messages": MESSAGES, "max_tokens": 2, "stream_options": {"include_usage": True}}
    lines = await raw_stream("/v1/chat/completions", **body)
    [first, second, last] = [json.loads(line.removeprefix("data: ")) for line in lines[1:4]]
    said, end = (one["choices"][0]["delta"]["content"] for one in (first, second))
    usage = last["usage"]
    head = '"id":"chatcmpl-i","object":"chat.completion.chunk","created":1,"model":"chat"'

    assert lines == [
        (
            f'data: {{{head},"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},'
            '"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}'
        ),
        (
            f'data: {{{head},"choices":[{{"index":0,"delta":{{"content":"{said}"}},'
            '"logprobs":null,"finish_reason":null,"token_ids":null}]}'
        ),
        (
            f'data: {{{head},"choices":[{{"index":0,"delta":{{"content":"{end}"}},'
            '"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}'
        ),
        (
            f'data: {{{head},"choices":[],"usage":{{"prompt_tokens":{usage["prompt_tokens"]},'
            f'"total_tokens":{usage["prompt_tokens"] + 2},"completion_tokens":2}},'
            '"system_fingerprint":"bora-sim"}'
        ),
        "data: [DONE]",
    ]


async def test_completion_stream_has_vllms_bytes_with_ids() -> None:
    lines = await raw_stream(
        "/v1/completions", prompt=[3 + ord("a")], max_tokens=2, return_token_ids=True
    )
    [first, second] = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:2]]
    head = '"id":"cmpl-i","object":"text_completion","created":1,"model":"chat"'

    assert lines == [
        (
            f'data: {{{head},"choices":[{{"index":0,"text":"{first["text"]}","logprobs":null,'
            '"finish_reason":null,"stop_reason":null,"prompt_token_ids":[100],'
            f'"token_ids":[{first["token_ids"][0]}]}}]}}'
        ),
        (
            f'data: {{{head},"choices":[{{"index":0,"text":"{second["text"]}","logprobs":null,'
            '"finish_reason":"length","stop_reason":null,"prompt_token_ids":null,'
            f'"token_ids":[{second["token_ids"][0]}]}}],"system_fingerprint":"bora-sim"}}'
        ),
        "data: [DONE]",
    ]


async def test_every_event_tells_the_usage_so_far_when_asked() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with serving(settings()) as session:
        events = await ask(
            session, messages=MESSAGES, max_tokens=4, stream=True, stream_options=options
        )

    assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 3, 4, 4]


async def test_answer_that_does_not_stream_has_its_ids_too() -> None:
    body = {"prompt": "the sea", "max_tokens": 5, "return_token_ids": True}
    async with serving(settings()) as session:
        choice = (await ask(session, "/v1/completions", **body))["choices"][0]
        chat = await ask(session, messages=MESSAGES, max_tokens=5, return_token_ids=True)
        without = (await ask(session, messages=MESSAGES, max_tokens=5))["choices"][0]

    assert (len(choice["token_ids"]), len(choice["prompt_token_ids"])) == (5, 2)
    assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    assert (len(chat["choices"][0]["token_ids"]), without["token_ids"]) == (5, None)


async def test_detokenize_is_the_reverse_of_tokenize() -> None:
    text = 'The 海 blows.\n  {"a": [1, 2]} 🌊'
    async with serving(settings()) as session:
        tokens = await ask(session, "/tokenize", prompt=text, return_token_strs=True)
        back = await ask(session, "/detokenize", tokens=tokens["tokens"])
        refused = await ask(session, "/detokenize", expect=400, tokens=[2**40])

    assert back == {"prompt": text}
    assert len(tokens["token_strs"]) == tokens["count"]
    assert "out of vocabulary" in refused["error"]["message"]


async def test_min_tokens_keeps_an_answer_from_ending() -> None:
    body = {"prompt": "all is calm.", "max_tokens": 50}
    async with serving(settings()) as session:
        short = await ask(session, "/v1/completions", **body)
        long = await ask(session, "/v1/completions", **body, min_tokens=10)
        await ask(session, "/v1/completions", expect=400, **body, min_tokens=51)

    assert short["usage"]["completion_tokens"] == 1
    assert long["usage"]["completion_tokens"] >= 10


async def test_conversation_is_continued_in_one_way_only() -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "The wind"}]
    async with serving(settings()) as session:
        error = await ask(session, expect=400, messages=turns, continue_final_message=True)

    assert "add_generation_prompt" in error["error"]["message"]


async def test_engine_without_token_ids_ignores_the_wish_and_takes_text_only() -> None:
    base = settings()
    plain = Settings("chat", base.limits, base.timing, speed=10.0, has_token_ids=False)
    async with serving(plain) as session:
        opening, event = await ask(
            session, messages=MESSAGES, max_tokens=1, stream=True, return_token_ids=True
        )
        error = await ask(session, "/v1/completions", expect=400, prompt=[300, 301])

    assert opening["prompt_token_ids"] is event["choices"][0]["token_ids"] is None
    assert "must be a string" in error["error"]["message"]
