from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from gateway.endpoints import EndpointTable, ServedModel
from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from gateway.server import Gateway
from tests.gateway.engines import (
    CHAT,
    USAGE,
    FakeEngine,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
    metric,
    until,
)


@asynccontextmanager
async def a_channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        yield channel


@asynccontextmanager
async def a_service(
    engine: FakeEngine | None = None,
    *,
    table: EndpointTable | None = None,
    limits: dict[str, Any] | None = None,
    **changes: Any,
) -> AsyncIterator[tuple[Gateway, inference_pb2_grpc.InferenceStub]]:
    """A gateway before `engine`, and a stub of its service."""
    if engine:
        table = a_table(an_endpoint(engine, **changes))
    async with (
        a_gateway(table, limits=limits, grpc_port=0) as gateway,
        a_channel(gateway) as channel,
    ):
        yield gateway, inference_pb2_grpc.InferenceStub(channel)


def a_request(**changes: Any) -> pb.ChatCompletionRequest:
    messages = [pb.ChatMessage(role="user", content="hi")]
    return pb.ChatCompletionRequest(**{"model": "chat", "messages": messages, **changes})


async def test_a_chat_completion_carries_every_field_both_ways() -> None:
    async with an_engine() as engine, a_service(engine, variant="v", id="r") as (_, stub):
        call = stub.ChatCompletion(
            a_request(
                temperature=0.0,
                top_p=0.9,
                max_tokens=5,
                stop=["a", "b"],
                seed=2**40,
                n=1,
                extra_json='{"logprobs": true, "model": "never"}',
            ),
            metadata=[("x-request-id", "grpc-1")],
        )
        answer = await call
        headers = dict(await call.trailing_metadata())

    assert engine.seen[0].json == {
        "model": "chat",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.0,
        "top_p": 0.9,
        "max_tokens": 5,
        "stop": ["a", "b"],
        "seed": 2**40,
        "n": 1,
        "logprobs": True,
        "stream": False,
    }
    assert engine.seen[0].headers["x-request-id"] == "grpc-1"
    assert answer.id == "cmpl-1"
    assert answer.created == 1700000000
    assert answer.model == "chat"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello big world"
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].extra_json) == {"stop_reason": 7}
    assert json.loads(answer.extra_json)["system_fingerprint"] == "fp"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 3)
    assert headers["x-bora-variant"] == "v"
    assert headers["x-bora-endpoint"] == "r"
    assert headers["x-request-id"] == "grpc-1"


async def test_content_parts_and_tool_calls_travel_too() -> None:
    parts = [{"type": "text", "text": "hi"}]
    messages = [
        pb.ChatMessage(role="user", extra_json=json.dumps({"content": parts})),
        pb.ChatMessage(
            role="assistant",
            tool_calls=[pb.ToolCall(id="1", type="function", function={"name": "f"})],
        ),
        pb.ChatMessage(role="tool", content="", tool_call_id="1"),
    ]
    async with an_engine() as engine, a_service(engine) as (_, stub):
        await stub.ChatCompletion(a_request(messages=messages))

    assert engine.seen[0].json["messages"] == [
        {"role": "user", "content": parts},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}],
        },
        {"role": "tool", "content": "", "tool_call_id": "1"},
    ]


async def test_a_chat_stream_arrives_chunk_by_chunk() -> None:
    async with an_engine(word_gate=asyncio.Event()) as engine, a_service(engine) as (gateway, stub):
        stream = stub.ChatCompletionStream(a_request(stream_options={"include_usage": True}))
        chunks = aiter(stream)
        first = await anext(chunks)
        assert first.choices[0].delta.content == "Hello"
        assert not first.choices[0].finish_reason
        engine.word_gate.set()
        rest = [chunk async for chunk in chunks]

        assert [c.choices[0].delta.content for c in rest[:-1]] == [" big", " world"]
        assert rest[-2].choices[0].finish_reason == "stop"
        assert rest[-1].usage.total_tokens == USAGE["total_tokens"]
        assert engine.seen[0].json["stream"] is True
        assert in_flight(gateway) == 0


async def test_completions_embeddings_and_token_counts() -> None:
    async with an_engine() as engine, a_service(engine) as (_, stub):
        request = pb.CompletionRequest(model="chat", prompt="Say")
        whole = await stub.Completion(request)
        chunks = [chunk.choices[0].text async for chunk in stub.CompletionStream(request)]
        embedded = await stub.Embeddings(pb.EmbeddingsRequest(model="chat", input=["a"]))
        counted = await stub.CountTokens(pb.CountTokensRequest(model="chat", prompt="Say"))

    assert whole.choices[0].text == "Hello big world"
    assert chunks == ["Hello", " big", " world"]
    assert list(embedded.data[0].embedding) == [0.5, -1.0]
    assert (counted.count, counted.max_model_len) == (5, 4096)
    assert engine.seen[-1].path == "/tokenize"
    assert engine.seen[-1].json == {"model": "chat", "prompt": "Say"}


async def test_models_are_listed() -> None:
    table = EndpointTable(models=(ServedModel(name="chat", aliases=("c",), max_model_len=8),))
    async with a_service(table=table) as (_, stub):
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).data

    assert (model.id, list(model.aliases), model.max_model_len) == ("chat", ["c"], 8)
    assert not model.HasField("parent")


async def test_adapters_are_listed_with_their_model() -> None:
    table = EndpointTable(models=(ServedModel(name="chat", adapters=("legal",)),))
    async with a_service(table=table) as (_, stub):
        listed = (await stub.ListModels(pb.ListModelsRequest())).data

    assert [(model.id, model.parent) for model in listed] == [("chat", ""), ("legal", "chat")]


@pytest.mark.parametrize(
    ("request_changes", "status", "told"),
    [
        ({"model": "nope"}, grpc.StatusCode.NOT_FOUND, "known: chat"),
        ({"model": ""}, grpc.StatusCode.INVALID_ARGUMENT, "`model` is required"),
        ({"extra_json": "{"}, grpc.StatusCode.INVALID_ARGUMENT, "extra_json"),
        ({"extra_json": "[]"}, grpc.StatusCode.INVALID_ARGUMENT, "JSON object"),
    ],
)
@pytest.mark.parametrize("method", ["ChatCompletion", "ChatCompletionStream"])
async def test_a_request_that_makes_no_sense_gets_its_status(
    request_changes: dict[str, Any], status: grpc.StatusCode, told: str, method: str
) -> None:
    async with an_engine() as engine, a_service(engine) as (_, stub):
        call = getattr(stub, method)(a_request(**request_changes))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await (call if method == "ChatCompletion" else call.read())

    assert failed.value.code() == status
    assert told in failed.value.details()


@pytest.mark.parametrize(
    ("http_status", "status"),
    [
        (400, grpc.StatusCode.INVALID_ARGUMENT),
        (404, grpc.StatusCode.NOT_FOUND),
        (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (500, grpc.StatusCode.INTERNAL),
        (503, grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_the_engines_own_errors_become_statuses(
    http_status: int, status: grpc.StatusCode
) -> None:
    async with an_engine(status=http_status) as engine, a_service(engine) as (gateway, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletion(a_request())

        assert failed.value.code() == status
        assert failed.value.details() == "engine says no"
        assert ("retry-after" in dict(failed.value.trailing_metadata())) == (
            http_status in {429, 503}
        )
        assert in_flight(gateway) == 0


async def test_no_replica_is_unavailable_with_retry_after() -> None:
    table = EndpointTable(models=(ServedModel(name="chat", scalable=True),))
    async with a_service(table=table, limits={"hold_timeout_s": 0.05}) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletion(a_request())

    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    assert dict(failed.value.trailing_metadata())["retry-after"] == "10"


async def test_a_full_queue_is_resource_exhausted() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_service(engine, max_in_flight=1, limits={"max_queued": 0}) as (_, stub),
    ):
        running = asyncio.ensure_future(_answer(stub))
        await until(lambda: engine.running == 1)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletion(a_request())
        engine.gate.set()
        await running

    assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def _answer(stub: inference_pb2_grpc.InferenceStub) -> pb.ChatCompletionResponse:
    return await stub.ChatCompletion(a_request())


async def test_a_deadline_stops_the_engine() -> None:
    async with an_engine(gate=asyncio.Event()) as engine, a_service(engine) as (gateway, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletion(a_request(), timeout=0.2)

        assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: engine.hung_up_on == 1, 1)
        await until(lambda: in_flight(gateway) == 0, 1)


async def test_a_cancelled_stream_stops_the_engine() -> None:
    async with an_engine(word_gate=asyncio.Event()) as engine, a_service(engine) as (gateway, stub):
        stream = stub.ChatCompletionStream(a_request())
        await stream.read()

        stream.cancel()

        await until(lambda: engine.hung_up_on == 1, 1)
        await until(lambda: in_flight(gateway) == 0, 1)


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


async def test_health_follows_readiness() -> None:
    async with (
        a_gateway(controller_url="http://127.0.0.1:9", grpc_port=0) as gateway,
        a_channel(gateway) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)

        async def says(service: str = "") -> str:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

        assert await says() == "NOT_SERVING"
        gateway.apply(a_table())
        assert await says() == "SERVING"
        assert await says("bora.v1.Inference") == "SERVING"
        assert await says("inference.GRPCInferenceService") == "SERVING"
        await gateway.drain(0)
        assert await says() == "NOT_SERVING"


async def test_reflection_describes_the_service() -> None:
    async with a_gateway(a_table(), grpc_port=0) as gateway:
        names, methods = await asyncio.to_thread(_reflected, gateway.grpc_port)

    oip = "inference.GRPCInferenceService"
    assert {"bora.v1.Inference", oip, "grpc.health.v1.Health"} <= set(names)
    assert "ChatCompletionStream" in methods


def _reflected(port: int) -> tuple[list[str], list[str]]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        service = DescriptorPool(database).FindServiceByName("bora.v1.Inference")
        return list(database.get_services()), [method.name for method in service.methods]


async def test_metadata_reaches_the_engine_as_headers_but_never_the_clients_credentials() -> None:
    given = {"x-session-id": "s-1", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    secrets = {"authorization": "Bearer of-the-client", "x-api-key": "of-the-client"}
    metadata = [*given.items(), *secrets.items(), ("data-bin", b"\x00")]
    async with an_engine() as engine, a_service(engine) as (_, stub):
        await stub.ChatCompletion(a_request(), metadata=metadata)

    headers = engine.seen[0].headers
    assert given.items() <= headers.items()
    assert "of-the-client" not in str(headers)


async def test_a_refusal_tells_its_request_id_too() -> None:
    async with an_engine() as engine, a_service(engine) as (_, stub):
        for method in (stub.ChatCompletion, stub.ChatCompletionStream):
            call = method(a_request(model="nope"), metadata=[("x-request-id", "no-1")])
            assert await call.code() == grpc.StatusCode.NOT_FOUND
            assert dict(await call.trailing_metadata())["x-request-id"] == "no-1"


async def test_bytes_that_are_no_message_are_an_invalid_argument() -> None:
    async with an_engine() as engine, a_service(engine) as (gateway, _), a_channel(gateway) as one:
        ask = one.unary_unary("/bora.v1.Inference/ChatCompletion")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await ask(b"\xff\xff")

    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "bora.v1.ChatCompletionRequest" in failed.value.details()


async def test_a_message_over_the_limit_is_refused_and_one_below_it_is_not() -> None:
    limits = {"max_body_bytes": 6 * 2**20}
    big = [pb.ChatMessage(role="user", content="x" * 5 * 2**20)]
    bigger = [pb.ChatMessage(role="user", content="x" * 7 * 2**20)]
    async with an_engine() as engine, a_service(engine, limits=limits) as (_, stub):
        await stub.ChatCompletion(a_request(messages=big))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletion(a_request(messages=bigger))

    assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(engine.seen) == 1


async def test_an_answer_larger_than_grpcs_usual_limit_gets_through() -> None:
    words = ("x" * 5 * 2**20,)
    options = [("grpc.max_receive_message_length", -1)]
    async with an_engine(words=words) as engine, a_service(engine) as (gateway, _):
        address = f"127.0.0.1:{gateway.grpc_port}"
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            answer = await inference_pb2_grpc.InferenceStub(channel).ChatCompletion(a_request())

    assert answer.choices[0].message.content == words[0]


async def test_a_compressed_request_is_understood() -> None:
    async with an_engine() as engine, a_service(engine) as (_, stub):
        await stub.ChatCompletion(a_request(), compression=grpc.Compression.Gzip)

    assert engine.seen[0].json["messages"] == [{"role": "user", "content": "hi"}]


async def test_a_deadline_while_waiting_for_a_place_leaves_the_queue() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_service(engine, max_in_flight=1) as (gateway, stub),
    ):
        running = asyncio.ensure_future(_answer(stub))
        await until(lambda: engine.running == 1)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletion(a_request(), timeout=0.1)
        await until(lambda: gateway.admission.queued("chat") == 0, 1)
        engine.gate.set()
        await running

    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_vanishes_stops_the_engine() -> None:
    async with an_engine(word_gate=asyncio.Event()) as engine, a_service(engine) as (gateway, _):
        async with a_channel(gateway) as channel:
            await inference_pb2_grpc.InferenceStub(channel).ChatCompletionStream(a_request()).read()

        await until(lambda: engine.hung_up_on == 1, 1)
        await until(lambda: in_flight(gateway) == 0, 1)


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
        draining = asyncio.create_task(gateway.drain(5))
        await asyncio.sleep(0.01)

        for refused in (stub.ChatCompletion(a_request()), stub.ChatCompletionStream(a_request())):
            assert await refused.code() == grpc.StatusCode.UNAVAILABLE
            assert dict(await refused.trailing_metadata())["retry-after"] == "1"
        assert not draining.done()

        engine.word_gate.set()
        while (chunk := await stream.read()) is not grpc.aio.EOF:
            words.append(chunk.choices[0].delta.content)
        await asyncio.wait_for(draining, 1)

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
        await until(lambda: engine.hung_up_on == 1, 1)


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
            frame = await asyncio.wait_for(reader.readexactly(9), 5)
            body = await reader.readexactly(int.from_bytes(frame[:3], "big"))
            assert frame[3] != goaway_type
            answered += frame + body == pong
        writer.close()


@pytest.mark.parametrize(
    "text", ["plain", 'quo"ted', "back\\slash\n", "snow ☃ 🎿", "", '"content": "x"']
)
@pytest.mark.parametrize("chat", [True, False])
async def test_every_text_of_a_stream_arrives_as_it_was(text: str, *, chat: bool) -> None:
    """Chunks alike are made without their JSON being parsed: texts must not be able to tell."""
    words = ("first", text, "middle", text, "last")
    async with an_engine(words=words) as engine, a_service(engine) as (_, stub):
        if chat:
            chunks = [c async for c in stub.ChatCompletionStream(a_request())]
            said = [c.choices[0].delta.content for c in chunks]
        else:
            request = pb.CompletionRequest(model="chat", prompt="Say")
            chunks = [c async for c in stub.CompletionStream(request)]
            said = [c.choices[0].text for c in chunks]
    assert said == list(words)
    assert {c.id for c in chunks} <= {"cmpl-1"}


async def test_grpc_requests_count_in_the_same_metrics() -> None:
    async with an_engine() as engine, a_service(engine) as (gateway, stub):
        await stub.ChatCompletion(a_request())
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ChatCompletion(a_request(model=""))
        async with a_client(gateway) as client:
            name = "bora_gateway_requests_total"
            assert await metric(client, name, api="grpc", status="200", model="chat") == 1
            assert await metric(client, name, api="grpc", status="400") == 1
            assert await metric(client, "bora_gateway_completion_tokens_total") == 3
    assert engine.seen[0].path == CHAT
