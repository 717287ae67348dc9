"""The HTTP face: OpenAI's API in front of `Forwarder`, as an application of our HTTP server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from gateway.access import require_use, visible
from gateway.bodies import ModelCard
from gateway.call import Call, new_call, request_id, terms_of
from gateway.catalog import model_card, model_cards
from gateway.console import Console
from gateway.errors import GatewayError, NoSuchRoute, Unavailable, WrongMethod
from gateway.forwarding import Forwarder
from gateway.head_cache import Head
from gateway.http_connection import HttpConnection
from gateway.http_parser import Request
from gateway.http_response import JSON_TYPE, error_headers, json_body
from gateway.openapi import document
from gateway.record import Record
from gateway.responses import Noting, StoredResponses
from gateway.routes import (
    FORWARDED_PATHS,
    MODEL_PATH,
    RESPONSES_PATH,
    methods_of,
    stored_methods,
)
from gateway.scrape import Scrape
from gateway.sse import error_event
from gateway.tenants import Tenant

_log = logging.getLogger(__name__)

_FORWARDED_PATHS = frozenset(FORWARDED_PATHS)
_TEXT_TYPE = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"


class HttpClient:
    """The client of one exchange, at the other end of a connection."""

    __slots__ = ("_call", "_is_event_stream", "_to", "write")

    def __init__(self, to: HttpConnection, call: Call) -> None:
        self.write: Callable[[bytes], None] = to.write
        self._to = to
        self._call = call
        self._is_event_stream = False

    @property
    def write_chunks(self) -> Callable[[bytes], None] | None:
        """See `gateway.plant.Client`, as for what follows."""
        return self._to.write_chunks

    def whole(self, status: int, headers: bytes, body: bytes) -> None:  # noqa: D102
        self._to.respond(status, headers, body)

    def start(self, status: int, headers: bytes, *, is_event_stream: bool) -> None:  # noqa: D102
        self._is_event_stream = is_event_stream
        self._to.start(status, headers)

    def finish(self) -> None:  # noqa: D102
        self._to.finish()

    def fail(self, error: GatewayError) -> None:
        """As an error body; once a response has begun as an error event, or else cut short."""
        to, call = self._to, self._call
        if not to.started:
            _respond_error(to, error, call.request_id)
        elif self._is_event_stream:
            to.write(error_event(error, call.path))
            to.finish()
        else:
            to.abort()


class HttpApi:
    """Answers all routes; `is_ready` answers `/ready`."""

    def __init__(
        self, forwarder: Forwarder, *, is_ready: Callable[[], bool], workers: int = 1
    ) -> None:
        console = Console(forwarder.admission, forwarder.meter, is_ready, workers=workers)
        self._forwarder = forwarder
        self._is_ready = is_ready
        self._responses = StoredResponses(forwarder.admission)
        self._scraping = asyncio.Lock()
        self._documents: dict[str, Callable[[], tuple[bytes, bytes]]] = {
            "/health": lambda: _json({"status": "ok"}),
            "/ready": self._ready,
            "/openapi.json": lambda: (JSON_TYPE, document()),
            "/console": console.page,
            "/console/data": lambda: (JSON_TYPE, console.data()),
        }

    def answer(self, request: Request, to: HttpConnection) -> None:
        """The edge: every failure becomes OpenAI's error body, and every response has an id."""
        head = request.head
        told_id = request_id(head.headers)
        if self._forwarder.draining:
            to.close_after()
        try:
            if _is_forwarded(head):
                self._infer(request, told_id, to)
            else:
                self._show(head, told_id, to)
        except GatewayError as error:
            _respond_error(to, error, told_id, methods_of(head.path))
        except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
            _log.exception("request %s failed", told_id)
            to.forsake()
            if to.started:
                to.abort()
            else:
                bug = GatewayError("internal error; the gateway's log has more")
                _respond_error(to, bug, told_id)

    def refuse(self, error: GatewayError, to: HttpConnection) -> None:
        """Answer what was no HTTP request, too large a one, or one too many."""
        record = Record(api="http", path="", request_id=request_id({}))
        self._forwarder.rejected(record, error)
        _respond_error(to, error, record.request_id)

    def _infer(self, request: Request, told_id: str, to: HttpConnection) -> None:
        """Forward a request; the answer is pushed back."""
        headers = request.head.headers
        try:
            tenant = self._forwarder.access.identify(headers)
            call = self._call(request, told_id, tenant)
            call.belongs_to(tenant)
        except GatewayError as error:
            record = Record(api="http", path=request.head.path, request_id=told_id)
            self._forwarder.rejected(record, error)
            raise
        client = HttpClient(to, call)
        if call.path == RESPONSES_PATH:
            noting = Noting(self._responses, call, client)
            exchange = self._forwarder.exchange(call, noting)
            noting.record = exchange.record
        else:
            exchange = self._forwarder.exchange(call, client)
        to.follow(exchange)
        exchange.begin()

    def _call(self, request: Request, told_id: str, tenant: Tenant) -> Call:
        head = request.head
        if head.path in _FORWARDED_PATHS and head.path != RESPONSES_PATH:
            terms = head.terms
            if terms is None:
                terms = head.terms = terms_of(head.headers)
            return new_call("http", head.path, request.body, terms, told_id)
        return self._responses.make_call(request, told_id, tenant)

    def _show(self, head: Head, told_id: str, to: HttpConnection) -> None:
        """One of our own documents."""
        path, admission = head.path, self._forwarder.admission
        allowed = methods_of(path)
        if allowed is None:
            method = head.method.decode()
            raise NoSuchRoute(f"there is no {method} {path[:200]}")
        if head.method.decode() not in allowed:
            raise WrongMethod(f"{path[:200]} takes {', '.join(allowed)}")
        tenant = self._forwarder.access.admit_to(path, head.headers)
        document = self._documents.get(path)
        if path == "/metrics":
            self._scrape(told_id, to)
            return
        if path == "/v1/models":
            content_type, body = _json({"object": "list", "data": self._model_cards(tenant)})
        elif document is not None:
            content_type, body = document()
        else:
            model = admission.resolve(path.removeprefix(MODEL_PATH), tenant)
            require_use(tenant, model)
            content_type, body = _json(model_card(admission, model))
        to.respond(200, content_type + b"x-request-id: %b\r\n" % told_id.encode(), body)

    def _scrape(self, told_id: str, to: HttpConnection) -> None:
        def respond(told: bytes | GatewayError) -> None:
            if isinstance(told, GatewayError):
                _respond_error(to, told, told_id)
            else:
                to.respond(200, _TEXT_TYPE + b"x-request-id: %b\r\n" % told_id.encode(), told)

        to.follow(Scrape(self._forwarder.meter, self._scraping, respond))

    def _model_cards(self, tenant: Tenant) -> list[ModelCard]:
        if self._forwarder.admission.table is None:
            raise Unavailable("the gateway has no endpoint table yet", retry_after_s=1)
        return visible(model_cards(self._forwarder.admission), tenant)

    def _ready(self) -> tuple[bytes, bytes]:
        if not self._is_ready():
            raise Unavailable("not ready: no endpoint table, or shutting down", retry_after_s=1)
        return _json({"status": "ready"})


def _is_forwarded(head: Head) -> bool:
    if head.method == b"POST" and head.path in _FORWARDED_PATHS:
        return True
    return head.method.decode() in (stored_methods(head.path) or ())


def _json(value: Any) -> tuple[bytes, bytes]:
    return JSON_TYPE, json_body(value)


def _respond_error(
    to: HttpConnection,
    error: GatewayError,
    told_id: str,
    allowed: tuple[str, ...] | None = None,
) -> None:
    headers = error_headers(error, told_id)
    if isinstance(error, WrongMethod) and allowed:
        headers += b"allow: %b\r\n" % ", ".join(allowed).encode()
    to.respond(error.status, headers, json_body(error.body()))
