import asyncio
import io
import json
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
    async with asyncio.timeout(10):
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
        body |= {"continue_final_message": True, "max_tokens": 6}
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
