from __future__ import annotations

import asyncio
import json

import openai
import pytest

from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
    metric,
    some_engines,
    until,
)

NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused


async def test_requests_go_to_the_least_loaded_endpoint() -> None:
    async with some_engines(3, gate=asyncio.Event()) as engines:
        endpoints = [
            an_endpoint(e, max_in_flight=n) for e, n in zip(engines, (4, 2, 2), strict=True)
        ]
        async with a_gateway(a_table(*endpoints)) as gateway, a_client(gateway) as client:
            asks = [asyncio.ensure_future(client.post(CHAT, json=a_chat())) for _ in range(8)]
            await until(lambda: sum(e.running for e in engines) == 8)

            assert [engine.running for engine in engines] == [4, 2, 2]

            for engine in engines:
                engine.gate.set()
            assert {(await ask).status for ask in asks} == {200}


async def test_an_endpoint_that_refuses_connections_is_gone_around_and_then_avoided() -> None:
    async with an_engine() as engine:
        table = a_table(an_endpoint(NOBODY, id="dead"), an_endpoint(engine))
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            for _ in range(6):
                async with client.post(CHAT, json=a_chat()) as response:
                    assert response.status == 200

            assert await metric(client, "bora_gateway_retries_total", model="chat") == 1
            assert in_flight(gateway) == 0


async def test_a_request_that_no_engine_got_yet_is_taken_past_any_number_of_dead_ones() -> None:
    async with an_engine() as engine:
        dead = [an_endpoint(NOBODY, id=f"dead-{n}", max_in_flight=64) for n in range(5)]
        table = a_table(*dead, an_endpoint(engine, max_in_flight=1))
        async with (
            a_gateway(table, limits={"max_attempts": 1}) as gateway,
            a_client(gateway) as client,
            client.post(CHAT, json=a_chat()) as response,
        ):
            assert response.status == 200
            assert await metric(client, "bora_gateway_retries_total", model="chat") > 1
            assert in_flight(gateway) == 0


async def test_a_suspect_endpoint_is_still_used_when_there_is_no_other() -> None:
    async with (
        an_engine(die_before_answer=True) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        assert (await client.post(CHAT, json=a_chat())).status == 502
        engine.die_before_answer = False
        assert (await client.post(CHAT, json=a_chat())).status == 200


@pytest.mark.parametrize("how", ["die_before_answer", "die_after_headers"])
async def test_an_engine_that_dies_before_its_first_byte_is_replaced_unseen(how: str) -> None:
    async with an_engine(**{how: True}) as dying, an_engine() as healthy:
        table = a_table(an_endpoint(dying, id="dying"), an_endpoint(healthy, id="healthy"))
        async with (
            a_gateway(table) as gateway,
            a_client(gateway) as client,
            client.post(CHAT, json=a_chat(stream=True)) as response,
        ):
            body = await response.read()

            assert response.status == 200
            assert body == b"".join(healthy.stream_chunks(CHAT, {"model": "chat"}))
            assert response.headers["x-bora-endpoint"] == "healthy"
            assert (len(dying.seen), len(healthy.seen)) == (1, 1)
            assert in_flight(gateway) == 0


async def test_if_every_engine_dies_before_its_first_byte_it_is_502() -> None:
    async with (
        some_engines(2, die_before_answer=True) as engines,
        a_gateway(a_table(*map(an_endpoint, engines))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(stream=True)) as response,
    ):
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "engine_failed"
        assert [len(engine.seen) for engine in engines] == [1, 1]
        assert in_flight(gateway) == 0


async def test_if_nobody_can_be_reached_it_is_503_with_retry_after() -> None:
    async with (
        a_gateway(a_table(an_endpoint(NOBODY))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat()) as response,
    ):
        assert response.status == 503
        assert response.headers["retry-after"] == "2"
        assert (await response.json())["error"]["code"] == "engine_unreachable"


async def test_attempts_are_bounded() -> None:
    async with (
        some_engines(4, die_before_answer=True) as engines,
        a_gateway(a_table(*map(an_endpoint, engines)), limits={"max_attempts": 2}) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat()) as response,
    ):
        assert response.status == 502
        assert sum(len(engine.seen) for engine in engines) == 2


async def test_an_engines_5xx_is_tried_once_elsewhere() -> None:
    async with an_engine(status=500) as failing, an_engine() as healthy:
        table = a_table(an_endpoint(failing), an_endpoint(healthy))
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            assert (await client.post(CHAT, json=a_chat())).status == 200
            assert await metric(client, "bora_gateway_retries_total", reason="500") == 1
            assert in_flight(gateway) == 0


async def test_a_5xx_from_two_engines_is_passed_through() -> None:
    async with (
        some_engines(3, status=500) as engines,
        a_gateway(a_table(*map(an_endpoint, engines))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat()) as response,
    ):
        assert response.status == 500
        assert (await response.json())["error"]["message"].endswith("says no")
        assert sum(len(engine.seen) for engine in engines) == 2
        assert in_flight(gateway) == 0


async def test_an_engine_that_dies_within_a_stream_ends_it_with_an_error_event() -> None:
    async with (
        an_engine(die_after_words=2) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(CHAT, json=a_chat(stream=True)) as response,
    ):
        body = await response.read()
        whole = engine.stream_chunks(CHAT, {"model": "chat"})
        error = body.removeprefix(b"".join(whole[:2]))

        assert error.startswith(b"data: ")
        assert error.endswith(b"\n\n")
        assert json.loads(error[6:])["error"]["code"] == "engine_failed"
        await until(lambda: in_flight(gateway) == 0)
        assert await metric(client, "bora_gateway_requests_total", status="502") == 1


async def test_the_openai_client_sees_a_broken_stream_as_an_error() -> None:
    async with (
        an_engine(die_after_words=1) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
    ):
        base_url = f"http://127.0.0.1:{gateway.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="any") as client:
            stream = await client.chat.completions.create(**a_chat(stream=True))
            with pytest.raises(openai.APIError, match="broke off"):
                _ = [chunk async for chunk in stream]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_other_apis_get_their_own_form_of_error_event(path: str) -> None:
    async with (
        an_engine(die_after_words=1) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
        client.post(path, json=a_chat(stream=True)) as response,
    ):
        last = (await response.read()).split(b"\n\n")[-2]

        assert last.startswith(b"event: error\ndata: ")
        assert json.loads(last.split(b"data: ")[1])["type"] == "error"


async def test_a_kept_alive_connection_that_the_engine_closed_meanwhile_is_no_failure() -> None:
    async with (
        an_engine(die_at_request=2) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        assert (await client.post(CHAT, json=a_chat())).status == 200
        assert (await client.post(CHAT, json=a_chat())).status == 200
        assert len(engine.seen) == 3
        assert await metric(client, "bora_gateway_retries_total") == 0


async def test_a_client_that_stops_reading_does_not_keep_its_place_past_its_deadline() -> None:
    flood = tuple(b'data: {"x": "' + b"x" * 65000 + b'"}\n\n' for _ in range(400))
    async with (
        an_engine(raw_chunks=flood) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port, limit=1024)
        body = json.dumps(a_chat(stream=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nx-request-timeout-s: 2\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await reader.read(10)
        assert in_flight(gateway) == 1

        await until(lambda: in_flight(gateway) == 0)

        await until(lambda: engine.running == 0)
        writer.transport.abort()
