from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cluster.engines.sim_batch import Limits, Timing
from cluster.engines.sim_drill import Fault
from cluster.engines.sim_server import Settings, SimulatedEngine
from cluster.engines.sim_transfer import Transfer
from gateway.continuation import CannotContinue, Splice, check, continuation
from gateway.transcript import Transcript
from tests.gateway.engines import (
    CHAT,
    PATIENCE_S,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    in_flight,
    metric,
)

COMPLETIONS = "/v1/completions"
KINDS = ("reset", "garbage-event")
NUM_TOKENS = 40


@dataclass
class Sim:
    url: str
    session: aiohttp.ClientSession

    async def fail(self, **fault: Any) -> None:
        response = await self.session.post("/drill", json=fault)
        assert response.status == 200, await response.text()


@asynccontextmanager
async def a_sim(
    *,
    token_ids: bool = True,
    speed: float = 10.0,
    prefill_tokens_per_s: float = 10_000.0,
    transfer: Transfer | None = None,
) -> AsyncIterator[Sim]:
    limits = Limits(
        max_num_seqs=64, max_num_batched_tokens=8192, kv_cache_tokens=65536, max_model_len=4096
    )
    timing = Timing(prefill_tokens_per_s, tpot_ms=5.0, tpot_ms_at_max=5.0, max_num_seqs=64)
    engine = SimulatedEngine(
        Settings(
            "chat",
            limits,
            timing,
            speed,
            has_token_ids=token_ids,
            fault=Fault(),
            transfer=transfer,
        )
    )
    runner = web.AppRunner(
        engine.application(), handler_cancellation=True, shutdown_timeout=0, access_log=None
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    clock = asyncio.create_task(engine.run())
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession(url) as session:
            yield Sim(url, session)
    finally:
        clock.cancel()
        with suppress(asyncio.CancelledError):
            await clock
        await runner.cleanup()


def a_request(path: str, **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "chat", "temperature": 0, "stream": True}
    asked["max_tokens"] = NUM_TOKENS
    asked["stream_options"] = {"include_usage": True}
    if path == CHAT:
        asked["messages"] = [{"role": "user", "content": "What does the wind do?"}]
    else:
        asked["prompt"] = "The bora falls"
    return {**asked, **changes}


async def events_of(session: aiohttp.ClientSession, path: str, asked: dict[str, Any]) -> list[Any]:
    """Every event of a stream, with what differs between any two requests made equal."""
    async with asyncio.timeout(PATIENCE_S), session.post(path, json=asked) as response:
        text = await response.text()
        assert response.status == 200, text
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events.pop() == "[DONE]", text
    chunks = [json.loads(event) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        del chunk["id"], chunk["created"]
        chunk.pop("system_fingerprint", None)  # unknown if the engine died before its last chunk
    return chunks


@asynccontextmanager
async def two_engines(
    *, told: bool = True, **limits: Any
) -> AsyncIterator[tuple[Sim, Sim, aiohttp.ClientSession, Any]]:
    """The first gets every request first; `told`: the gateway knows that they tell token ids."""
    kind = "sim" if told else None
    async with a_sim(token_ids=told) as first, a_sim(token_ids=told) as second:
        table = a_table(
            an_endpoint(first.url, id="first", engine=kind),
            an_endpoint(second.url, id="second", engine=kind),
        )
        async with (
            a_gateway(
                table, limits={"suspect_s": 0.01, "max_migrations": 10_000, **limits}
            ) as gateway,
            a_client(gateway) as client,
        ):
            yield first, second, client, gateway


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_cut_at_any_token_is_the_undisturbed_one(path: str, kind: str) -> None:
    async with two_engines() as (first, second, client, gateway):
        expected = await events_of(second.session, path, a_request(path))
        for number in range(2, NUM_TOKENS):
            await asyncio.gather(
                first.fail(kind=kind, after_tokens=number), second.fail(kind=kind, after_tokens=2)
            )
            task = asyncio.create_task(events_of(client, path, a_request(path)))
            await asyncio.sleep(0.005)
            await second.fail(kind="none")
            assert await task == expected, number

        assert await metric(client, "bora_gateway_migrations_total") >= NUM_TOKENS / 3
        assert in_flight(gateway) == 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_without_token_ids_the_text_so_far_goes_on(path: str) -> None:
    async with two_engines(told=False) as (first, second, client, gateway):
        asked = a_request(path, stream_options=None)
        expected = await events_of(second.session, path, asked)
        text = "".join(said(chunk) for chunk in expected)
        for number in (1, 7, 20, 39):
            await first.fail(kind="reset", after_tokens=number)
            await second.fail(kind="reset", after_tokens=number)
            task = asyncio.create_task(events_of(client, path, asked))
            await asyncio.sleep(0.03)
            await second.fail(kind="none")
            await first.fail(kind="none")
            chunks = await task

            assert "".join(said(chunk) for chunk in chunks) == text
            assert [c["choices"][0]["finish_reason"] for c in chunks].count("length") == 1
        assert in_flight(gateway) == 0


def said(chunk: dict[str, Any]) -> str:
    choice = chunk["choices"][0]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content") or "")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("met", [True, False])
async def test_text_held_back_for_a_stop_string_is_neither_lost_nor_sent_twice(
    path: str, met: bool
) -> None:
    async with two_engines() as (first, second, client, gateway):
        text = "".join(map(said, (await events_of(second.session, path, a_request(path)))[:-1]))
        asked = a_request(path, stop=[text[-20:-9] if met else "never said", "#"])
        expected = await events_of(second.session, path, asked)
        for number in range(2, NUM_TOKENS - 5):
            await asyncio.gather(
                first.fail(kind="reset", after_tokens=number),
                second.fail(kind="reset", after_tokens=3),
            )
            task = asyncio.create_task(events_of(client, path, asked))
            await asyncio.sleep(0.01)
            await second.fail(kind="none")
            assert await task == expected, number
        assert in_flight(gateway) == 0


async def test_an_engine_that_falls_silent_in_a_stream_is_left() -> None:
    async with two_engines(stall_timeout_s=0.3) as (first, second, client, _):
        expected = await events_of(second.session, CHAT, a_request(CHAT))
        await first.fail(kind="silence", after_tokens=9)

        assert await events_of(client, CHAT, a_request(CHAT)) == expected


async def test_a_stream_that_waits_for_its_next_engine_is_kept_open_by_comments() -> None:
    async with two_engines(heartbeat_s=0.05) as (first, second, client, _):
        await first.fail(kind="reset", after_tokens=9)
        await second.fail(kind="status", status=503)
        said = b""
        async with (
            asyncio.timeout(PATIENCE_S),
            client.post(CHAT, json=a_request(CHAT)) as response,
        ):
            while said.count(b": the request waits\n\n") < 3:
                said += await response.content.readany()
                assert not response.content.at_eof()
            await first.fail(kind="none")
            said += await response.content.read()

        assert said.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in said


async def test_clients_that_ask_for_token_ids_get_all_of_them() -> None:
    async with two_engines() as (first, second, client, _):
        asked = a_request(CHAT, return_token_ids=True)
        expected = await events_of(second.session, CHAT, asked)
        await first.fail(kind="reset", after_tokens=11)

        assert await events_of(client, CHAT, asked) == expected
        assert expected[3]["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"n": 2}, "several choices"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "grammar"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{}], "tool_choice": "required"}, "grammar"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"json_schema": {}, "grammar": "root ::= x"}, "grammar"),
        ({"prompt": ["a", "b"]}, "several choices"),
        ({"prompt": [[1], [2]]}, "several choices"),
        ({"max_tokens": "5"}, "max_tokens"),
    ],
)
def test_what_cannot_be_continued_faithfully_says_why(more: dict[str, Any], why: str) -> None:
    with pytest.raises(CannotContinue, match=why):
        check(a_chat(**more), Transcript(is_chat=True, hides_ids=False))


async def test_a_stream_that_cannot_go_on_ends_with_an_error_event() -> None:
    async with two_engines() as (first, _, client, gateway):
        await first.fail(kind="reset", after_tokens=5)
        asked = a_request(CHAT, response_format={"type": "json_object"})
        async with client.post(CHAT, json=asked) as response:
            events = (await response.text()).split("\n\n")

        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert error["code"] == "engine_failed"
        assert "grammar" in error["message"]
        assert in_flight(gateway) == 0


async def test_engines_die_again_and_again_and_the_stream_goes_on() -> None:
    async with two_engines() as (first, second, client, _):
        expected = await events_of(second.session, CHAT, a_request(CHAT))
        for sim in (first, second):
            await sim.fail(kind="reset", after_tokens=4)

        assert await events_of(client, CHAT, a_request(CHAT)) == expected


async def test_a_stream_gives_up_after_so_many_engines() -> None:
    async with two_engines(max_migrations=2) as (first, second, client, gateway):
        for sim in (first, second):
            await sim.fail(kind="reset", after_tokens=2)
        async with client.post(CHAT, json=a_request(CHAT)) as response:
            text = await response.text()

        assert '"code": "engine_failed"' in text
        assert in_flight(gateway) == 0


def fed(transcript: Transcript, *chunks: dict[str, Any]) -> None:
    for chunk in chunks:
        compact = json.dumps({"id": "1", **chunk}, separators=(",", ":"))
        transcript.feed(b"data: " + compact.encode() + b"\n\n")


def delta(ids: list[int] | None = None, **said: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": said, "finish_reason": None, "token_ids": ids}]}


def test_tokens_without_text_are_made_anew() -> None:
    told = Transcript(is_chat=True, hides_ids=True)
    fed(told, {**delta(role="assistant", content=""), "prompt_token_ids": [1, 2]})
    fed(told, delta([3], content="a"), delta([4, 5], content="b"), delta([6], content=""))

    told.roll_back()
    path, body = continuation(CHAT, a_chat(max_tokens=9), told, by_ids=True)

    assert (path, body["prompt"], body["max_tokens"]) == (COMPLETIONS, [1, 2, 3, 4, 5], 6)


def test_images_tools_and_stop_strings_of_sampled_text_go_on_by_text() -> None:
    told = Transcript(is_chat=True, hides_ids=True)
    fed(told, {**delta(role="assistant", content=""), "prompt_token_ids": [1, 2]})
    fed(told, delta([3], content='say "a"'), delta([4], content=" b\n"))
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for more in ({"stop": ["xy"]}, {"tools": [{}]}, {"messages": image}):
        path, body = continuation(CHAT, a_chat(max_tokens=9, **more), told, by_ids=True)

        assert (path, body["max_tokens"]) == (CHAT, 7)
        assert body["messages"][-1] == {"role": "assistant", "content": 'say "a" b\n'}
        assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_a_final_message_of_several_parts_is_not_gone_on_with() -> None:
    told = Transcript(is_chat=True, hides_ids=False)
    fed(told, delta(role="assistant", content="a"))
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "so"}]}]

    with pytest.raises(CannotContinue, match="final message"):
        continuation(CHAT, a_chat(messages=parts, continue_final_message=True), told, by_ids=False)


def test_reasoning_goes_on_only_once_the_answer_has_begun_and_with_its_tokens() -> None:
    told = Transcript(is_chat=True, hides_ids=True)
    fed(told, {**delta(role="assistant", content=""), "prompt_token_ids": [1]})
    fed(told, delta([3], reasoning="hm"))
    with pytest.raises(CannotContinue, match="reasoning"):
        check(a_chat(), told)

    fed(told, delta([4], content="so"))
    check(a_chat(), told)

    assert continuation(CHAT, a_chat(), told, by_ids=True)[1]["prompt"] == [1, 3, 4]
    with pytest.raises(CannotContinue, match="reasoned"):
        continuation(CHAT, a_chat(), told, by_ids=False)


def test_a_stream_that_has_said_nothing_is_asked_anew_and_its_reasoning_passed_on() -> None:
    told = Transcript(is_chat=True, hides_ids=True)
    fed(told, {**delta(role="assistant", content=""), "prompt_token_ids": [1]})
    told.roll_back()
    asked = a_chat(max_tokens=9)

    path, body = continuation(CHAT, asked, told, by_ids=True)
    splice = Splice(told, asked, CHAT)
    chunks = delta([5], reasoning="hm"), delta([6], content="so")
    said = splice.feed(b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks))

    assert (path, body) == (CHAT, {**asked, "return_token_ids": True})
    assert [json.loads(event[6:])["choices"][0] for event in said.split(b"\n\n") if event] == [
        {"index": 0, "delta": {"reasoning": "hm"}, "finish_reason": None, "token_ids": None},
        {
            "index": 0,
            "delta": {"content": "so"},
            "finish_reason": None,
            "logprobs": None,
            "token_ids": None,
        },
    ]
    assert told.reasoned
    assert told.token_ids == [5, 6]


@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": ")])
def test_ids_are_hidden_byte_for_byte(spaces: tuple[str, str]) -> None:
    def event(ids: list[int] | None, text: str, *, first: bool = False) -> bytes:
        chunk: dict[str, Any] = {"id": "1", **delta(ids, content=text)}
        if first:
            chunk["prompt_token_ids"] = None if ids is None else [1, 2, 3]
        return b"data: " + json.dumps(chunk, separators=spaces).encode() + b"\n\n"

    told = Transcript(is_chat=True, hides_ids=True)
    texts = ["", "a", 'quote "token_ids":[7] ', "\\", "ž", "", "end"]
    reads = [event([n, n + 1], t, first=not n) for n, t in enumerate(texts)]
    reads += [reads[1] + reads[2], reads[3] + reads[4] + reads[5]]
    plain = [event(None, t, first=not n) for n, t in enumerate(texts)]
    plain += [plain[1] + plain[2], plain[3] + plain[4] + plain[5]]

    hidden = [told.feed(read).replace(b'ids":null', b'ids": null') for read in reads]

    assert hidden == [read.replace(b'ids":null', b'ids": null') for read in plain]
    assert told.num_tokens == 24


def test_a_chunk_that_only_tells_ids_is_not_for_the_client_but_counts() -> None:
    told = Transcript(is_chat=True, hides_ids=True)
    fed(told, {**delta(role="assistant", content=""), "prompt_token_ids": [1]})
    chunks = [{"id": "1", **delta([n], **said)} for n, said in ((3, {}), (4, {"content": "a"}))]
    events = b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks)

    passed = [told.feed(events), told.feed(events.split(b"\n\n")[0] + b"\n\n")]

    assert passed[0].count(b"data: ") == 1
    assert b'"content": "a"' in passed[0]
    assert passed[1] == b""
    assert told.num_tokens == 3
