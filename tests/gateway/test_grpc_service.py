"""What surrounds gRPC calls: health, reflection, metadata, sizes and compression of messages."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from tests.gateway.engines import (
    a_gateway,
    a_table,
    an_engine,
)
from tests.gateway.grpc_service import a_channel, a_request, a_service


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
