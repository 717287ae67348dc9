"""The gRPC face: `bora.v1.Inference` in front of `Forwarder`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from gateway.access import visible
from gateway.call import Call
from gateway.catalog import model_cards
from gateway.chunk_messages import ChunkMessages
from gateway.errors import Unavailable
from gateway.forwarding import Forwarder
from gateway.grpc_edge import (
    answering,
    headers_for_client,
    metadata_of,
    new_call,
    parsed_request,
    send,
    whole_body,
)
from gateway.grpc_messages import fill, to_json
from gateway.proto import inference_pb2 as pb
from gateway.sse import event_data

SERVICE = "bora.v1.Inference"


@dataclass(frozen=True, slots=True)
class _Method:
    """One of OpenAI's paths. `stream` is what the body says of it; None: it has no such field."""

    path: str
    request: type[Message]
    answer: type[Message]
    stream: bool | None = None


_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_METHODS = {
    "ChatCompletion": _Method(_CHAT, pb.ChatCompletionRequest, pb.ChatCompletionResponse, False),
    "ChatCompletionStream": _Method(
        _CHAT, pb.ChatCompletionRequest, pb.ChatCompletionChunk, stream=True
    ),
    "Completion": _Method(_TEXT, pb.CompletionRequest, pb.CompletionResponse, False),
    "CompletionStream": _Method(_TEXT, pb.CompletionRequest, pb.CompletionResponse, stream=True),
    "Embeddings": _Method("/v1/embeddings", pb.EmbeddingsRequest, pb.EmbeddingsResponse),
    "CountTokens": _Method("/tokenize", pb.CountTokensRequest, pb.CountTokensResponse),
}


class GrpcApi:
    """The service's methods. Each is OpenAI's path of the same meaning."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    def handlers(self) -> Any:
        """For `add_generic_rpc_handlers`. Messages go in and out as bytes."""
        methods = {name: self._handler(method) for name, method in _METHODS.items()}
        methods["ListModels"] = grpc.unary_unary_rpc_method_handler(answering(self._list_models))
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _handler(self, method: _Method) -> Any:
        if method.stream:
            return grpc.unary_stream_rpc_method_handler(answering(self._streaming(method)))
        return grpc.unary_unary_rpc_method_handler(answering(self._unary(method)))

    def _unary(self, method: _Method) -> Callable[[bytes, Any], Any]:
        async def answer(data: bytes, context: Any) -> bytes:
            call = self._call(method, data, context)
            async with self._forwarder.forward(call) as reply:
                context.set_trailing_metadata(headers_for_client(reply))
                return _filled(method.answer(), whole_body(reply))

        return answer

    def _streaming(self, method: _Method) -> Callable[[bytes, Any], Any]:
        async def answer(data: bytes, context: Any) -> None:
            call = self._call(method, data, context)
            async with self._forwarder.forward(call) as reply:
                await context.send_initial_metadata(headers_for_client(reply))
                chunks = ChunkMessages(method.answer)
                while events := await reply.next():
                    for event in event_data(events):
                        await send(context, chunks.message(event))

        return answer

    def _call(self, method: _Method, data: bytes, context: Any) -> Call:
        def payload() -> dict[str, Any]:
            result = to_json(parsed_request(method.request, data))
            if method.stream is not None:
                result["stream"] = method.stream
            return result

        return new_call(self._forwarder, context, method.path, payload)

    async def _list_models(self, _data: bytes, context: Any) -> bytes:
        admission = self._forwarder.admission
        tenant = self._forwarder.access.identify(metadata_of(context))
        if admission.table is None:
            raise Unavailable("the gateway has no endpoint table yet", retry_after_s=1)
        return _filled(pb.ListModelsResponse(), {"data": visible(model_cards(admission), tenant)})


def _filled(message: Message, values: dict[str, Any]) -> bytes:
    fill(message, values)
    return message.SerializeToString()
