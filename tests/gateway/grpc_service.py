"""A gateway's gRPC API, and what it is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from gateway.endpoints import EndpointTable
from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from gateway.server import Gateway
from tests.gateway.engines import (
    FakeEngine,
    a_gateway,
    a_table,
    an_endpoint,
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


async def answer_of(stub: inference_pb2_grpc.InferenceStub) -> pb.ChatCompletionResponse:
    return await stub.ChatCompletion(a_request())
