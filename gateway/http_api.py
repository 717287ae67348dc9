"""The HTTP face: OpenAI's API in front of `Forwarder`, on aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from gateway.call import make_call, request_id
from gateway.catalog import model_card, model_cards
from gateway.errors import (
    BadRequest,
    BodyTooLarge,
    GatewayError,
    NoSuchRoute,
    Unavailable,
    WrongMethod,
)
from gateway.forwarding import Forwarder, Reply
from gateway.metering import Record
from gateway.sse import error_event

_log = logging.getLogger(__name__)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Passed through to engines, which know what they mean; only `model` is ours.
FORWARDED_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/tokenize",
    "/detokenize",
)
_LAST_WORDS_S = 2.0
_REQUEST_ID = web.RequestKey("request_id", str)


def make_app(forwarder: Forwarder, *, is_ready: Callable[[], bool]) -> web.Application:
    """The application; `is_ready` answers `/ready`."""
    api = HttpApi(forwarder, is_ready)
    limit = forwarder.admission.limits.max_body_bytes
    app = web.Application(middlewares=[_errors_as_bodies], client_max_size=limit)
    for path in FORWARDED_PATHS:
        app.router.add_post(path, api.infer)
    app.router.add_get("/v1/models", api.models)
    app.router.add_get("/v1/models/{id:.+}", api.model)
    app.router.add_get("/health", api.health)
    app.router.add_get("/ready", api.ready)
    app.router.add_get("/metrics", api.metrics)
    return app


class HttpApi:
    """Handlers of all routes."""

    def __init__(self, forwarder: Forwarder, is_ready: Callable[[], bool]) -> None:
        self._forwarder = forwarder
        self._is_ready = is_ready

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """Forward a request and stream the answer back."""
        try:
            call = make_call(
                api="http",
                path=request.path,
                body=await self._body(request),
                headers=request.headers,
            )
        except GatewayError as error:
            record = Record(api="http", path=request.path, request_id=request[_REQUEST_ID])
            self._forwarder.rejected(record, error)
            raise
        call.request_id = request[_REQUEST_ID]
        response: web.StreamResponse | None = None
        try:
            async with self._forwarder.forward(call) as reply:
                if reply.body is not None:
                    return web.Response(status=reply.status, headers=reply.headers, body=reply.body)
                response = web.StreamResponse(status=reply.status, headers=reply.headers)
                await response.prepare(request)
                await _pour(reply, response)
        except GatewayError as error:
            if response is None:
                raise
            await _break_off(request, response, error)
        return response

    async def models(self, _request: web.Request) -> web.Response:
        """The models that this gateway serves."""
        self._require_table()
        cards = model_cards(self._forwarder.admission)
        return web.json_response({"object": "list", "data": cards})

    async def model(self, request: web.Request) -> web.Response:
        """One model, by name or alias."""
        admission = self._forwarder.admission
        model = admission.resolve(request.match_info["id"])
        return web.json_response(model_card(admission, model))

    async def health(self, _request: web.Request) -> web.Response:
        """The process lives."""
        return web.json_response({"status": "ok"})

    async def ready(self, _request: web.Request) -> web.Response:
        """It takes requests: it has an endpoint table and is not draining."""
        if not self._is_ready():
            raise Unavailable("not ready: no endpoint table, or shutting down", retry_after_s=1)
        return web.json_response({"status": "ready"})

    async def metrics(self, _request: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(
            body=self._forwarder.meter.exposition(),
            headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    def _require_table(self) -> None:
        if self._forwarder.admission.table is None:
            raise Unavailable("the gateway has no endpoint table yet", retry_after_s=1)

    async def _body(self, request: web.Request) -> bytes:
        limit = self._forwarder.admission.limits.max_body_bytes
        if (request.content_length or 0) > limit:
            raise _too_large(limit)
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise _too_large(limit) from None
        except web.RequestPayloadError as error:
            raise BadRequest(f"the body cannot be read: {error}") from None


async def _pour(reply: Reply, response: web.StreamResponse) -> None:
    while chunk := await reply.next():
        await response.write(chunk)
    await response.write_eof()


async def _break_off(
    request: web.Request, response: web.StreamResponse, error: GatewayError
) -> None:
    """End a response whose headers are gone: with an error event, or else visibly cut short."""
    if response.content_type == "text/event-stream":
        # The client may have stopped reading; it is not waited for long.
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await response.write(error_event(error, request.path))
                await response.write_eof()
                return
    if request.transport:
        request.transport.abort()


@web.middleware
async def _errors_as_bodies(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """The edge: every failure becomes OpenAI's error body, and every response has an id."""
    request[_REQUEST_ID] = request_id(request.headers)
    try:
        response = await handler(request)
    except GatewayError as error:
        response = _error_response(error)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        response = _error_response(WrongMethod(f"{request.path} takes {allowed}"))
        response.headers["allow"] = allowed
    except web.HTTPNotFound:
        response = _error_response(
            NoSuchRoute(f"there is no {request.method} {request.path[:200]}")
        )
    except web.HTTPException as error:
        response = _error_response(BadRequest(error.reason))
    except ConnectionResetError:
        response = web.Response()  # the client left: nobody will read it
    except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
        _log.exception("request %s failed", request[_REQUEST_ID])
        response = _error_response(GatewayError("internal error; the gateway's log has more"))
    if not response.prepared:
        response.headers["x-request-id"] = request[_REQUEST_ID]
    return response


def _error_response(error: GatewayError) -> web.Response:
    response = web.json_response(error.body(), status=error.status)
    if error.retry_after:
        response.headers["retry-after"] = error.retry_after
    return response


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes")
