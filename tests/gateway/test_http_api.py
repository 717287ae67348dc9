from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest

from gateway.endpoints import EndpointTable, ServedModel
from gateway.http_api import FORWARDED_PATHS
from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
    until,
)


async def test_a_stream_reaches_the_client_byte_for_byte() -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine, variant="v1", id="replica-1"))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(stream=True)) as response,
    ):
        body = await response.read()

        assert response.status == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert body == b"".join(engine.stream_chunks(CHAT, {"model": "chat"}))
        assert response.headers["x-bora-variant"] == "v1"
        assert response.headers["x-bora-endpoint"] == "replica-1"


async def test_events_cut_anywhere_and_with_any_line_ends_arrive_unchanged() -> None:
    chunks = (b": hi\r\n\r\nda", b'ta: {"a', b'": 1}\r\n\r', b"\ndata: {}\n\ndata: [DONE]")
    async with (
        an_engine(raw_chunks=chunks) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(stream=True)) as response,
    ):
        assert await response.read() == b"".join(chunks)


async def test_the_first_word_arrives_while_the_engine_still_works() -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(stream=True)) as response,
    ):
        assert b"Hello" in await response.content.readany()
        engine.word_gate.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_the_body_reaches_the_engine_byte_for_byte() -> None:
    body = b'{ "model":"chat",\n "x": 1.50, "messages": [] , "u":"\\u00e9"}'
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, data=body, headers={"content-type": "text/plain"}) as response,
    ):
        assert response.status == 200
        assert engine.seen[0].body == body


@pytest.mark.parametrize("path", FORWARDED_PATHS)
async def test_every_path_is_routed_by_the_bodys_model(path: str) -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(path, json={"model": "chat"}) as response,
    ):
        assert response.status == 200
        assert engine.seen[0].path == path


async def test_models_and_aliases_go_to_their_own_engines_under_the_engines_names() -> None:
    async with an_engine(name="a") as chat, an_engine(name="b") as code:
        table = EndpointTable(
            models=(ServedModel(name="chat", aliases=("gpt-4o",)), ServedModel(name="org/code")),
            endpoints=(
                an_endpoint(chat),
                an_endpoint(code, model="org/code", served_model_name="weights"),
            ),
        )
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            await client.post(CHAT, json=a_chat(model="gpt-4o"))
            await client.post(CHAT, json=a_chat(model="org/code", seed=1))

    assert [request.json["model"] for request in chat.seen] == ["chat"]
    assert [request.json for request in code.seen] == [a_chat(model="weights", seed=1)]


async def test_the_clients_credentials_stay_here_and_the_engine_gets_its_own_key() -> None:
    sent = {
        "authorization": "Bearer clients-secret",
        "x-api-key": "clients-secret",
        "cookie": "a=b",
    }
    async with an_engine() as locked, an_engine() as open_engine:
        table = a_table(
            an_endpoint(locked, model="locked", api_key="engine-key"),
            an_endpoint(open_engine, model="open"),
        )
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            for model in ("locked", "open"):
                await client.post(CHAT, json=a_chat(model=model), headers=sent)

    assert locked.seen[0].headers["authorization"] == "Bearer engine-key"
    assert "authorization" not in open_engine.seen[0].headers
    assert "secret" not in str(locked.seen + open_engine.seen)
    assert "cookie" not in open_engine.seen[0].headers


async def test_request_id_and_trace_go_to_the_engine_and_the_id_comes_back() -> None:
    headers = {"x-request-id": "job:1", "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
    async with (
        an_engine(headers={"x-request-id": "engines-own", "x-extra": "kept"}) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(), headers=headers) as response,
    ):
        assert response.headers.getall("x-request-id") == ["job:1"]
        assert response.headers["x-extra"] == "kept"
        assert engine.seen[0].headers["x-request-id"] == "job:1"
        assert engine.seen[0].headers["traceparent"] == headers["traceparent"]


@pytest.mark.parametrize("bad", ["", "a" * 129, "with space", "ünïcode", "a\tb"])
async def test_a_request_id_that_is_not_sane_is_replaced(bad: str) -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(), headers={"x-request-id": bad}) as response,
    ):
        assert len(response.headers["x-request-id"]) == 32
        assert engine.seen[0].headers["x-request-id"] == response.headers["x-request-id"]


async def test_names_with_line_breaks_cannot_inject_headers() -> None:
    endpoint_changes = {"variant": "v\r\nx-evil: 1", "id": "e\nset-cookie: a"}
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine, **endpoint_changes))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat()) as response,
    ):
        assert response.status == 200
        assert "x-evil" not in response.headers
        assert "set-cookie" not in response.headers
        assert response.headers["x-bora-variant"] == "v??x-evil:?1"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'"chat"', "must be a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"model": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{}", "`model` is required"),
        (b'{"model": 3}', "`model` is required"),
        (b'{"model": ""}', "`model` is required"),
        (b'{"model": null}', "`model` is required"),
    ],
)
async def test_a_body_that_makes_no_sense_is_400_with_the_reason(body: bytes, told: str) -> None:
    async with (
        a_gateway() as gateway,
        a_client(gateway) as client,
        client.post(CHAT, data=body) as response,
    ):
        error = (await response.json())["error"]

        assert response.status == 400
        assert told in error["message"]
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("bad", ["soon", "0", "-1", "nan", "inf", "1e9", ""])
async def test_a_time_limit_that_makes_no_sense_is_400(bad: str) -> None:
    async with (
        a_gateway() as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(), headers={"x-request-timeout-s": bad}) as response,
    ):
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "x-request-timeout-s"


async def test_an_unknown_model_is_404_with_the_nearest_names() -> None:
    async with (
        a_gateway() as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(model="chta")) as response,
    ):
        error = (await response.json())["error"]

        assert response.status == 404
        assert error["code"] == "model_not_found"
        assert "did you mean 'chat'" in error["message"]


async def test_a_model_name_of_lone_surrogates_is_just_unknown() -> None:
    async with (
        a_gateway() as gateway,
        a_client(gateway) as client,
        client.post(CHAT, data=b'{"model": "\\ud800\\u0000"}') as response,
    ):
        assert response.status == 404


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_413(chunked: bool) -> None:
    async def drip() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 100

    async with (
        a_gateway(limits={"max_body_bytes": 1000}) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, data=drip() if chunked else b"x" * 3000) as response,
    ):
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "request_too_large"


async def test_unknown_paths_and_methods_get_openai_error_bodies_too() -> None:
    async with a_gateway() as gateway, a_client(gateway) as client:
        async with client.get("/nope") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "unknown_url"
            assert response.headers["x-request-id"]
        async with client.get(CHAT) as response:
            assert response.status == 405
            assert response.headers["allow"] == "POST"
            assert (await response.json())["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 503])
async def test_the_engines_own_errors_are_passed_through(status: int) -> None:
    async with (
        an_engine(status=status) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat()) as response,
    ):
        assert response.status == status
        assert (await response.json())["error"]["message"] == "engine says no"
        assert ("retry-after" in response.headers) == (status in {429, 503})
        assert in_flight(gateway) == 0


async def test_models_are_listed_and_found_by_name_and_alias() -> None:
    table = EndpointTable(
        models=(
            ServedModel(name="org/chat", aliases=("c",), created=5, capabilities=("vision",)),
            ServedModel(name="asleep", scalable=True, max_model_len=8),
        ),
        endpoints=(an_endpoint("http://127.0.0.1:9", model="org/chat", max_model_len=4096),),
    )
    async with a_gateway(table) as gateway, a_client(gateway) as client:
        listed = await (await client.get("/v1/models")).json()
        by_alias = await (await client.get("/v1/models/c")).json()
        by_name = await (await client.get("/v1/models/org/chat")).json()
        missing = await client.get("/v1/models/d")

        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["org/chat", "asleep"]
        assert by_alias == by_name == listed["data"][0]
        assert by_name["created"] == 5
        assert by_name["max_model_len"] == 4096
        assert by_name["capabilities"] == ["vision"]
        assert listed["data"][1]["ready_endpoints"] == 0
        assert missing.status == 404


async def test_before_there_is_a_table_it_lives_but_is_not_ready() -> None:
    async with (
        a_gateway(controller_url="http://127.0.0.1:9") as gateway,
        a_client(gateway) as client,
    ):
        assert (await client.get("/health")).status == 200
        for response in (
            await client.get("/ready"),
            await client.get("/v1/models"),
            await client.post(CHAT, json=a_chat()),
        ):
            assert response.status == 503
            assert response.headers["retry-after"] == "1"

        gateway.apply(a_table())

        assert (await client.get("/ready")).status == 200


async def test_a_client_that_leaves_stops_the_engine_and_frees_its_place() -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat(stream=True))
        await response.content.readany()
        assert in_flight(gateway) == 1

        response.close()

        await until(lambda: engine.hung_up_on == 1)
        await until(lambda: in_flight(gateway) == 0)


async def test_a_client_that_leaves_before_the_answer_stops_the_engine_too() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        with pytest.raises(TimeoutError):
            await client.post(CHAT, json=a_chat(), timeout=aiohttp.ClientTimeout(total=0.2))

        await until(lambda: engine.hung_up_on == 1)
        await until(lambda: in_flight(gateway) == 0)


async def test_a_deadline_before_the_answer_is_504() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(), headers={"x-request-timeout-s": "0.1"}) as response,
    ):
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "deadline_exceeded"
        await until(lambda: engine.hung_up_on == 1)
        assert in_flight(gateway) == 0


async def test_a_deadline_within_a_stream_ends_it_with_an_error_event() -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(
            CHAT, json=a_chat(stream=True), headers={"x-request-timeout-s": "0.2"}
        ) as response,
    ):
        events = (await response.read()).split(b"\n\n")

        assert response.status == 200
        assert json.loads(events[-2][6:])["error"]["code"] == "deadline_exceeded"
        await until(lambda: engine.hung_up_on == 1)
        assert in_flight(gateway) == 0


async def test_the_openai_client_works() -> None:
    async with an_engine() as engine, a_gateway(a_table(an_endpoint(engine))) as gateway:
        base_url = f"http://127.0.0.1:{gateway.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
            messages = [{"role": "user", "content": "hi"}]
            whole = await client.chat.completions.create(model="chat", messages=messages)
            stream = await client.chat.completions.create(
                model="chat", messages=messages, stream=True
            )
            words = [chunk.choices[0].delta.content async for chunk in stream]
            models = [model.id async for model in client.models.list()]
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.chat.completions.create(model="other", messages=messages)

        assert whole.choices[0].message.content == "Hello big world"
        assert words == ["Hello", " big", " world"]
        assert models == ["chat"]


async def test_a_bug_of_ours_is_500_with_a_body_and_a_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        gateway.admission._lanes.clear()
        async with client.post(CHAT, json=a_chat()) as response:
            assert response.status == 500
            assert (await response.json())["error"]["type"] == "internal_error"
        assert "KeyError" in caplog.text
