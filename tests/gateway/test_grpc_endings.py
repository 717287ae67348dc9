"""How gRPC calls end: by deadlines, clients that leave, engines that die, and a gateway that drains."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from gateway.proto import inference_pb2_grpc
from tests.gateway.engines import (
    PATIENCE_S,
    a_gateway,
    a_table,
    an_engine,
    in_flight,
    until,
)
from tests.gateway.grpc_service import a_channel, a_request, a_service, answer_of


async def test_a_deadline_stops_the_engine() -> None:
    async with an_engine(gate=asyncio.Event()) as engine, a_service(engine) as (gateway, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletion(a_request(), timeout=0.2)

        assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: engine.hung_up_on == 1)
        await until(lambda: in_flight(gateway) == 0)


async def test_a_cancelled_stream_stops_the_engine() -> None:
    async with an_engine(word_gate=asyncio.Event()) as engine, a_service(engine) as (gateway, stub):
        stream = stub.ChatCompletionStream(a_request())
        await stream.read()

        stream.cancel()

        await until(lambda: engine.hung_up_on == 1)
        await until(lambda: in_flight(gateway) == 0)


async def test_an_engine_that_dies_within_a_stream_is_unavailable() -> None:
    async with an_engine(die_after_words=1) as engine, a_service(engine) as (gateway, stub):
        stream = stub.ChatCompletionStream(a_request())
        assert (await stream.read()).choices[0].delta.content == "Hello"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stream.read()

        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        assert in_flight(gateway) == 0


async def test_an_error_event_of_the_engine_ends_the_stream_with_its_status() -> None:
    event = b'data: {"error": {"message": "too long", "code": 400}}\n\n'
    async with an_engine(raw_chunks=(event,)) as engine, a_service(engine) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletionStream(a_request()).read()

    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert failed.value.details() == "too long"


async def test_a_deadline_while_waiting_for_a_place_leaves_the_queue() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_service(engine, max_in_flight=1) as (gateway, stub),
    ):
        running = asyncio.ensure_future(answer_of(stub))
        await until(lambda: engine.running == 1)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletion(a_request(), timeout=0.1)
        await until(lambda: gateway.admission.queued("chat") == 0)
        engine.gate.set()
        await running

    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_vanishes_stops_the_engine() -> None:
    async with an_engine(word_gate=asyncio.Event()) as engine, a_service(engine) as (gateway, _):
        async with a_channel(gateway) as channel:
            await inference_pb2_grpc.InferenceStub(channel).ChatCompletionStream(a_request()).read()

        await until(lambda: engine.hung_up_on == 1)
        await until(lambda: in_flight(gateway) == 0)


async def test_clients_that_leave_while_words_pour_leave_nothing_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        an_engine(words=("word ",) * 2000) as engine,
        a_service(engine) as (gateway, stub),
    ):
        streams = [stub.ChatCompletionStream(a_request()) for _ in range(20)]
        for stream in streams:
            await stream.read()
            stream.cancel()
        await until(lambda: in_flight(gateway) == 0)
        await until(lambda: engine.running == 0)

    assert "gRPC request failed" not in caplog.text


async def test_draining_lets_streams_finish_and_refuses_new_calls_with_retry_after() -> None:
    async with an_engine(word_gate=asyncio.Event()) as engine, a_service(engine) as (gateway, stub):
        stream = stub.ChatCompletionStream(a_request())
        words = [(await stream.read()).choices[0].delta.content]
        draining = asyncio.create_task(gateway.drain(1000))
        await asyncio.sleep(0.01)

        for refused in (stub.ChatCompletion(a_request()), stub.ChatCompletionStream(a_request())):
            assert await refused.code() == grpc.StatusCode.UNAVAILABLE
            assert dict(await refused.trailing_metadata())["retry-after"] == "1"
        assert not draining.done()

        engine.word_gate.set()
        while (chunk := await stream.read()) is not grpc.aio.EOF:
            words.append(chunk.choices[0].delta.content)
        await asyncio.wait_for(draining, PATIENCE_S)

    assert "".join(words) == "Hello big world"


async def test_a_stream_that_outlasts_the_drain_deadline_is_unavailable() -> None:
    async with an_engine(word_gate=asyncio.Event()) as engine, a_service(engine) as (gateway, stub):
        stream = stub.ChatCompletionStream(a_request())
        await stream.read()

        await gateway.drain(0.05)

        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stream.read()
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        assert dict(failed.value.trailing_metadata())["retry-after"] == "1"
        await until(lambda: engine.hung_up_on == 1)


async def test_many_pings_are_answered_and_nobody_is_hung_up_on() -> None:
    ping = bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + b"bora-api"
    pong = bytes((0, 0, 8, 6, 1, 0, 0, 0, 0)) + b"bora-api"
    goaway_type = 7
    async with a_gateway(a_table(), grpc_port=0) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.grpc_port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        answered = 0
        while answered < 20:
            writer.write(ping)
            frame = await asyncio.wait_for(reader.readexactly(9), PATIENCE_S)
            body = await reader.readexactly(int.from_bytes(frame[:3], "big"))
            assert frame[3] != goaway_type
            answered += frame + body == pong
        writer.close()
