"""The gRPC face: `bora.v1.Inference` in front of `Forwarder`, with health and reflection."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway.call import Call, make_call, request_id
from gateway.catalog import model_cards
from gateway.errors import EngineBroke, GatewayError, Unavailable
from gateway.forwarding import Forwarder
from gateway.grpc_messages import fill, to_json
from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from gateway.pull import Pull
from gateway.record import Record
from gateway.sse import event_data

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer", bound=Message)
SERVICE = "bora.v1.Inference"

_STATUS_OF_HTTP = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class EngineRefused(GatewayError):
    """The engine answered with an error, which the client gets as it is."""

    def __init__(self, http_status: int, error: Any, retry_after: str | None) -> None:
        error = error.get("error", error) if isinstance(error, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        super().__init__(str(error.get("message") or f"the engine answered {http_status}"))
        status = _STATUS_OF_HTTP.get(http_status, grpc.StatusCode.INTERNAL)
        self.status, self.grpc_status = http_status, status.name
        self._retry_after = retry_after

    @property
    def retry_after(self) -> str | None:
        """As the engine, or the gateway in its place, said it."""
        return self._retry_after


class GrpcApi(inference_pb2_grpc.InferenceServicer):
    """The service's methods. Each is OpenAI's path of the same meaning."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    async def ChatCompletion(  # noqa: N802, D102 - named by the .proto
        self, request: pb.ChatCompletionRequest, context: Any
    ) -> pb.ChatCompletionResponse:
        return await self._unary(
            request, context, "/v1/chat/completions", pb.ChatCompletionResponse()
        )

    async def ChatCompletionStream(  # noqa: N802, D102
        self, request: pb.ChatCompletionRequest, context: Any
    ) -> None:
        await self._stream(request, context, "/v1/chat/completions", pb.ChatCompletionChunk)

    async def Completion(  # noqa: N802, D102
        self, request: pb.CompletionRequest, context: Any
    ) -> pb.CompletionResponse:
        return await self._unary(request, context, "/v1/completions", pb.CompletionResponse())

    async def CompletionStream(  # noqa: N802, D102
        self, request: pb.CompletionRequest, context: Any
    ) -> None:
        await self._stream(request, context, "/v1/completions", pb.CompletionResponse)

    async def Embeddings(  # noqa: N802, D102
        self, request: pb.EmbeddingsRequest, context: Any
    ) -> pb.EmbeddingsResponse:
        return await self._unary(request, context, "/v1/embeddings", pb.EmbeddingsResponse())

    async def CountTokens(  # noqa: N802, D102
        self, request: pb.CountTokensRequest, context: Any
    ) -> pb.CountTokensResponse:
        return await self._unary(request, context, "/tokenize", pb.CountTokensResponse())

    async def ListModels(  # noqa: N802, D102
        self, _request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        admission = self._forwarder.admission
        async with _errors_as_statuses(context):
            if admission.table is None:
                raise Unavailable("the gateway has no endpoint table yet", retry_after_s=1)
        return _filled(pb.ListModelsResponse(), {"data": model_cards(admission)})

    async def _unary(self, request: Message, context: Any, path: str, answer: _Answer) -> _Answer:
        async with self._reply(request, context, path, stream=False) as reply:
            body = reply.body
            if body is None:
                raise EngineBroke("the engine answered with something else than JSON")
            fill(answer, _parsed(body))
        return answer

    async def _stream(
        self, request: Message, context: Any, path: str, form: Callable[[], Message]
    ) -> None:
        async with self._reply(request, context, path, stream=True) as reply:
            while events := await reply.next():
                for chunk in _parsed_events(events):
                    await context.write(_filled(form(), chunk))

    @asynccontextmanager
    async def _reply(
        self, request: Message, context: Any, path: str, *, stream: bool
    ) -> AsyncIterator[Pull]:
        """The engine's reply to `request`, if it is none of failure."""
        async with _errors_as_statuses(context):
            call = self._call(request, context, path, stream=stream)
            async with self._forwarder.forward(call) as reply:
                if reply.status >= 400:
                    error = _parsed(reply.body) if reply.body else None
                    raise EngineRefused(reply.status, error, reply.headers.get("retry-after"))
                await context.send_initial_metadata(
                    [(name, reply.headers[name]) for name in _METADATA]
                )
                yield reply

    def _call(self, request: Message, context: Any, path: str, *, stream: bool) -> Call:
        metadata = {
            key: value for key, value in context.invocation_metadata() if isinstance(value, str)
        }
        try:
            payload = to_json(request)
            if path not in {"/tokenize", "/v1/embeddings"}:
                payload["stream"] = stream
            body = json.dumps(payload).encode()
            call = make_call("grpc", path, body, metadata, request_id(metadata))
        except GatewayError as error:
            record = Record(api="grpc", path=path, request_id=request_id(metadata))
            self._forwarder.rejected(record, error)
            raise
        remaining = context.time_remaining()
        if remaining is not None:
            call.timeout_s = min(remaining, call.timeout_s or remaining)
        return call


_METADATA = ("x-request-id", "x-bora-variant", "x-bora-endpoint")


@asynccontextmanager
async def _errors_as_statuses(context: Any) -> AsyncIterator[None]:
    """The edge: every failure becomes a gRPC status, with `retry-after` in the trailing metadata."""
    try:
        yield
    except GatewayError as error:
        trailing = (("retry-after", error.retry_after),) if error.retry_after else ()
        status = grpc.StatusCode[error.grpc_status]
        await context.abort(status, error.message, trailing_metadata=trailing)
    except grpc.aio.AbortError:
        raise
    except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
        _log.exception("gRPC request failed")
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the gateway's log has more")


def _parsed_events(events: bytes) -> Iterator[dict[str, Any]]:
    """What each event says. An engine's error event raises `EngineRefused`."""
    for data in event_data(events):
        chunk = _parsed(data)
        if "error" in chunk:
            error = chunk["error"]
            code = error.get("code") if isinstance(error, dict) else None
            raise EngineRefused(code if isinstance(code, int) else 500, chunk, None)
        yield chunk


def _filled(message: _Answer, values: dict[str, Any]) -> _Answer:
    fill(message, values)
    return message


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        raise EngineBroke("the engine answered with something else than JSON") from None
    if not isinstance(value, dict):
        raise EngineBroke("the engine answered with something else than a JSON object")
    return value


class GrpcServer:
    """The service with `grpc.health.v1.Health` and reflection, on a port of its own."""

    def __init__(self, forwarder: Forwarder, *, reuse_port: bool) -> None:
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", int(reuse_port)),
                ("grpc.max_receive_message_length", forwarder.admission.limits.max_body_bytes),
                ("grpc.max_send_message_length", -1),
            ]
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(GrpcApi(forwarder), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises `RuntimeError` if it is taken."""
        await self.set_ready(ready=False)
        bound: int = self._server.add_insecure_port(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        )
        await self._server.start()
        return bound

    async def set_ready(self, *, ready: bool) -> None:
        """What the health service says."""
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if ready else states.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, state)

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, and end those that still run after `grace_s`."""
        await self._server.stop(grace_s)
