"""What a call held, its body above all, is freed when it is over, not when garbage is collected."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import grpc
import pytest

from gateway.call import Call
from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    until,
)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def no_call_is_held() -> bool:
    # By type: some objects of libraries warn when they are asked for their class.
    return not any(type(each) is Call for each in gc.get_objects())


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_over_http_is_freed_when_it_is_over(stream: bool) -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        for _ in range(3):
            response = await client.post(CHAT, json=a_chat(stream=stream))
            assert (response.status, len(await response.read()) > 0) == (200, True)

        await until(no_call_is_held)


@pytest.mark.usefixtures("no_collector")
async def test_a_call_over_grpc_is_freed_when_it_is_over() -> None:
    request = pb.CompletionRequest(model="chat", prompt="Say")
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine)), grpc_port=0) as gateway,
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        for _ in range(3):
            await stub.Completion(request)
            assert len([chunk async for chunk in stub.CompletionStream(request)]) > 1

        await until(no_call_is_held)
