"""What all gRPC services share: how a request becomes a call, and a failure a status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from gateway.call import Call, make_call, request_id
from gateway.errors import BadRequest, EngineBroke, GatewayError
from gateway.forwarding import Forwarder
from gateway.lenient_json import json_bytes, read_json
from gateway.pull import Pull
from gateway.record import Record
from gateway.sse import event_data

_log = logging.getLogger(__name__)
_Request = TypeVar("_Request", bound=Message)
_TOLD = ("x-request-id", "x-bora-variant", "x-bora-endpoint")

_STATUS_OF_HTTP = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
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

    def __init__(self, http_status: int, error: Any, retry_after: str | None = None) -> None:
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


def answering(
    handler: Callable[[Any, Any], Awaitable[Any]],
) -> Callable[[Any, Any], Awaitable[Any]]:
    """The edge: every failure becomes a gRPC status, with `retry-after` in the trailing metadata."""

    async def answer(request: Any, context: Any) -> Any:
        try:
            return await handler(request, context)
        except GatewayError as error:
            trailing = tuple(context.trailing_metadata() or ())
            trailing += tuple(error.more_headers.items())
            if error.retry_after:
                trailing += (("retry-after", error.retry_after),)
            status = grpc.StatusCode[error.grpc_status]
            await context.abort(status, error.message, trailing_metadata=trailing)
        except grpc.aio.AbortError:
            raise
        except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
            _log.exception("gRPC request failed")
            await context.abort(
                grpc.StatusCode.INTERNAL, "internal error; the gateway's log has more"
            )

    return answer


def metadata_of(context: Any) -> dict[str, str]:
    """The client's metadata as HTTP's headers: names in lower case, without binary values."""
    return {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}


def parsed_request(form: type[_Request], data: bytes) -> _Request:
    """The message that `data` is.

    Raises:
        BadRequest: it is no such message.
    """
    try:
        return form.FromString(data)
    except DecodeError:
        raise BadRequest(f"the request is no {form.DESCRIPTOR.full_name}") from None


def new_call(
    forwarder: Forwarder,
    context: Any,
    path: str,
    payload: Callable[[], dict[str, Any]],
    api: str = "grpc",
) -> Call:
    """A call of what `payload` gives, with the RPC's deadline. A refusal is accounted for.

    Raises:
        GatewayError: the request makes no sense.
    """
    headers = metadata_of(context)
    told_id = request_id(headers)
    context.set_trailing_metadata((("x-request-id", told_id),))
    try:
        tenant = forwarder.access.identify(headers)
        call = make_call(api, path, json_bytes(payload()), headers, told_id)
        call.belongs_to(tenant)
    except GatewayError as error:
        forwarder.rejected(Record(api=api, path=path, request_id=told_id), error)
        raise
    remaining = context.time_remaining()
    if remaining is not None:
        call.timeout_s = min(remaining, call.timeout_s or remaining)
    return call


async def send(context: Any, message: bytes) -> None:
    """Write one message of a stream.

    Raises:
        CancelledError: the client left before gRPC could say so.
    """
    try:
        await context.write(message)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def headers_for_client(reply: Pull) -> list[tuple[str, str]]:
    """What a client is told beside a good reply: before a stream, and after a single answer.

    In front of a single answer it would cost a write of its own, a fifth of the whole RPC.

    Raises:
        EngineRefused: the engine answered with an error.
    """
    headers = reply.headers
    if reply.status >= 400:
        error = parsed_object(reply.body) if reply.body else None
        raise EngineRefused(reply.status, error, headers.get("retry-after"))
    return [(name, headers[name]) for name in _TOLD]


def whole_body(reply: Pull) -> dict[str, Any]:
    """The JSON object that an engine answered with.

    Raises:
        EngineBroke: it was something else.
    """
    if reply.body is None:
        raise EngineBroke("the engine answered with something else than JSON")
    return parsed_object(reply.body)


def chunks_of(events: bytes) -> Iterator[dict[str, Any]]:
    """What each event says.

    Raises:
        EngineRefused: it is the engine's error event.
        EngineBroke: it is no JSON object.
    """
    for data in event_data(events):
        yield chunk_of(data)


def chunk_of(data: bytes) -> dict[str, Any]:
    """What one event says. Raises as `chunks_of`."""
    chunk = parsed_object(data)
    if "error" in chunk:
        error = chunk["error"]
        code = error.get("code") if isinstance(error, dict) else None
        raise EngineRefused(code if isinstance(code, int) else 500, chunk)
    return chunk


def parsed_object(data: bytes) -> dict[str, Any]:
    """A JSON object of an engine.

    Raises:
        EngineBroke: it is none.
    """
    try:
        value = read_json(data)
    except ValueError:
        raise EngineBroke("the engine answered with something else than JSON") from None
    if not isinstance(value, dict):
        raise EngineBroke("the engine answered with something else than a JSON object")
    return value
