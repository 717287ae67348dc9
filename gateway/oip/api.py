"""The gRPC face for clients of KServe and Triton: `inference.GRPCInferenceService`."""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
from google.protobuf.message import Message

from gateway.access import require_use
from gateway.call import Call, request_id
from gateway.errors import BadRequest, GatewayError
from gateway.forwarding import Forwarder
from gateway.grpc_edge import (
    answering,
    chunk_of,
    headers_for_client,
    metadata_of,
    new_call,
    parsed_request,
    send,
    whole_body,
)
from gateway.oip.answers import VERSION, Answers, failure, in_stream
from gateway.oip.requests import MESSAGES, OUTPUTS, TEXT_INPUTS, Wanted, understood
from gateway.proto import oip_pb2 as oip
from gateway.record import Record
from gateway.sse import event_data

_log = logging.getLogger(__name__)
SERVICE = "inference.GRPCInferenceService"
_API = "oip"
_MOST_AT_ONCE = 256  # requests of one ModelStreamInfer; further ones are read later
_INPUTS = {TEXT_INPUTS[0]: "BYTES", MESSAGES: "BYTES", "stream": "BOOL"}
_INPUTS |= {"sampling_parameters": "BYTES", "exclude_input_in_output": "BOOL"}


class OipApi:
    """The service's methods. Texts and messages go the ways of OpenAI's API."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    def handlers(self) -> Any:
        """For `add_generic_rpc_handlers`. Messages go in and out as bytes."""
        unary = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(answering(method))
            for name, method in unary.items()
        }
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            answering(self._stream_infer)
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _server_live(self, _data: bytes, _context: Any) -> bytes:
        return _bytes(oip.ServerLiveResponse(live=True))

    async def _server_ready(self, _data: bytes, _context: Any) -> bytes:
        forwarder = self._forwarder
        ready = forwarder.admission.table is not None and not forwarder.draining
        return _bytes(oip.ServerReadyResponse(ready=ready))

    async def _model_ready(self, data: bytes, context: Any) -> bytes:
        request = parsed_request(oip.ModelReadyRequest, data)
        tenant = self._forwarder.access.identify(metadata_of(context))
        router = self._forwarder.admission.router
        model = router.resolve(request.name) if request.version in {"", VERSION} else None
        if model is not None:
            require_use(tenant, model)
        ready = model is not None and router.num_ready(model.name) > 0
        return _bytes(oip.ModelReadyResponse(ready=ready and not self._forwarder.draining))

    async def _server_metadata(self, _data: bytes, _context: Any) -> bytes:
        return _bytes(oip.ServerMetadataResponse(name="bora", version=_own_version()))

    async def _model_metadata(self, data: bytes, context: Any) -> bytes:
        request = parsed_request(oip.ModelMetadataRequest, data)
        if request.version not in {"", VERSION}:
            raise BadRequest(f"models have version '1' only, not {request.version[:50]!r}")
        tenant = self._forwarder.access.identify(metadata_of(context))
        require_use(tenant, self._forwarder.admission.resolve(request.name, tenant))
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return _bytes(
            oip.ModelMetadataResponse(
                name=request.name,
                versions=[VERSION],
                platform="bora",
                inputs=[tensor(name=n, datatype=t, shape=[1]) for n, t in _INPUTS.items()],
                outputs=[tensor(name=n, datatype=t, shape=[-1]) for n, t in OUTPUTS.items()],
            )
        )

    async def _infer(self, data: bytes, context: Any) -> bytes:
        wanted, call = self._call(data, context, may_stream=False)
        async with self._forwarder.forward(call) as reply:
            context.set_trailing_metadata(headers_for_client(reply))
            return _bytes(Answers(wanted).whole(whole_body(reply)))

    async def _stream_infer(self, _requests: Any, context: Any) -> None:
        """Requests of one stream run side by side; ids tell whose a response is."""
        outbox = _Outbox(context)
        places = asyncio.Semaphore(_MOST_AT_ONCE)
        async with asyncio.TaskGroup() as running:
            while True:
                await places.acquire()
                data = await context.read()
                if data is grpc.aio.EOF:
                    return
                task = running.create_task(self._answer(data, context, outbox))
                task.add_done_callback(lambda _: places.release())

    async def _answer(self, data: bytes, context: Any, outbox: _Outbox) -> None:
        """The responses to one request of a stream, which outlives its failure."""
        try:
            wanted, call = self._call(data, context, may_stream=True)
            await self._respond(wanted, call, outbox)
        except GatewayError as error:
            await outbox.put(failure(_id_of(data), error.message))
        except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
            _log.exception("gRPC request failed")
            message = "internal error; the gateway's log has more"
            await outbox.put(failure(_id_of(data), message))

    async def _respond(self, wanted: Wanted, call: Call, outbox: _Outbox) -> None:
        answers = Answers(wanted)
        async with self._forwarder.forward(call) as reply:
            headers_for_client(reply)  # for its errors: a stream of requests has no headers of one
            if not wanted.stream:
                await outbox.put(in_stream(answers.whole(whole_body(reply))))
            else:
                while events := await reply.next():
                    for event in event_data(events):
                        await outbox.put(answers.chunk(chunk_of(event)))
        await outbox.put(answers.final())

    def _call(self, data: bytes, context: Any, *, may_stream: bool) -> tuple[Wanted, Call]:
        try:
            self._forwarder.access.identify(metadata_of(context))  # before all that is costly
            wanted = understood(parsed_request(oip.ModelInferRequest, data))
            if wanted.stream and not may_stream:
                raise BadRequest("ModelInfer cannot stream: use ModelStreamInfer", param="stream")
        except GatewayError as error:
            record = Record(api=_API, path="", request_id=request_id(metadata_of(context)))
            self._forwarder.rejected(record, error)
            raise
        path, payload = wanted.path, wanted.payload
        call = new_call(self._forwarder, context, path, lambda: payload, _API)
        if wanted.timeout_s is not None:
            call.timeout_s = min(wanted.timeout_s, call.timeout_s or wanted.timeout_s)
        return wanted, call


class _Outbox:
    """Writes to a stream, one message at a time."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._turn = asyncio.Lock()

    async def put(self, message: oip.ModelStreamInferResponse | None) -> None:
        """Write it, unless there is none."""
        if message is not None:
            async with self._turn:
                await send(self._context, message.SerializeToString())


def _bytes(message: Message) -> bytes:
    return message.SerializeToString()


def _id_of(data: bytes) -> str:
    try:
        return parsed_request(oip.ModelInferRequest, data).id
    except BadRequest:
        return ""


def _own_version() -> str:
    try:
        return version("bora")
    except PackageNotFoundError:  # run from its sources
        return "0"
