"""What gRPC requests and answers carry, and the statuses of those that cannot be served."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest

from gateway.endpoints import EndpointTable, ServedModel
from gateway.proto import inference_pb2 as pb
from tests.gateway.engines import (
    CHAT,
    USAGE,
    a_client,
    an_engine,
    in_flight,
    metric,
    until,
)
from tests.gateway.grpc_service import a_request, a_service, answer_of


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
        running = asyncio.ensure_future(answer_of(stub))
        await until(lambda: engine.running == 1)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ChatCompletion(a_request())
        engine.gate.set()
        await running

    assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


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
