"""The request path: admit, route, ask the engine, hand its answer back, account for it.

The faces (`http_api`, `grpc_api`) make a Call and write a Reply; everything between is here, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.admission import Admission
from gateway.call import Call
from gateway.engine import Answer, EngineClient
from gateway.errors import (
    DeadlineExceeded,
    EngineBroke,
    EngineUnreachable,
    GatewayError,
    Unavailable,
)
from gateway.metering import Meter, Record
from gateway.routing import Lease
from gateway.sse import EventAligner
from gateway.tracing import Tracing
from gateway.usage import find_usage, has_usage

_log = logging.getLogger(__name__)

_CLIENT_LEFT = 499
_LAST_WORDS_S = 3.0  # after the drain deadline, for errors to get out
# Answers that another replica may well not give.
_RETRIED_STATUSES = frozenset((500, 502, 503, 504))
_NOT_FORWARDED = frozenset(
    (
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"),
        *("upgrade", "content-length", "date", "server", "set-cookie", "x-request-id"),
    )
)
_UNSAFE_IN_HEADER = re.compile(r"[^\x21-\x7e]")


class Reply:
    """An engine's answer on its way to the client: all of it in `body`, or chunk by chunk."""

    def __init__(self, answer: Answer, record: Record) -> None:
        self.status = answer.status
        self.headers = {
            **{k.lower(): v for k, v in answer.headers.items() if k.lower() not in _NOT_FORWARDED},
            "x-request-id": record.request_id,
            "x-bora-variant": _UNSAFE_IN_HEADER.sub("?", record.variant),
            "x-bora-endpoint": _UNSAFE_IN_HEADER.sub("?", record.endpoint),
        }
        if self.status in {429, 503}:
            self.headers.setdefault("retry-after", "1")
        content_type = self.headers.get("content-type", "")
        self.is_event_stream = content_type.startswith("text/event-stream")
        self.is_json = content_type.startswith("application/json")
        self.body: bytes | None = None
        self._answer = answer
        self._record = record
        self._aligner = EventAligner()
        self._first = b""

    async def begin(self) -> None:
        """Wait for the first bytes of a stream, or for all of a JSON body.

        Until then nothing has gone to the client, so that the request can be made elsewhere.

        Raises:
            EngineBroke: the engine went away before that.
        """
        if self.is_json:
            self.body = await self._answer.read()
            self._note_usage(self.body)
            return
        self._first = await self._answer.next()
        if self.is_event_stream:
            if not self._first:
                raise EngineBroke(f"the engine at {self._record.endpoint} ended an empty stream")
            self._record.ttft_s = self._record.age_s

    async def next(self) -> bytes:
        """The next bytes for the client, whole events if it is an event stream; empty at the end.

        Raises:
            EngineBroke: the engine went away before the end.
        """
        while chunk := self._first or await self._answer.next():
            self._first = b""
            if not self.is_event_stream:
                return chunk
            if events := self._aligner.feed(chunk):
                self._note_usage(events)
                return events
        tail, self._aligner.tail = self._aligner.tail, b""
        return tail

    def _note_usage(self, data: bytes) -> None:
        if has_usage(data):
            self._record.usage = find_usage(data) or self._record.usage


class Exchange:
    """A call and where it stands."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.record = Record(api=call.api, path=call.path, request_id=call.request_id)
        self.scope = asyncio.timeout(call.timeout_s)
        self.tried: set[str] = set()
        self.lease: Lease | None = None
        self.answer: Answer | None = None
        self.moved = False  # once after an engine's 5xx
        self.ended_by: GatewayError | None = None

    def end(self, reason: GatewayError) -> None:
        """Stop it now, with `reason` as the error that the client gets."""
        if not self.scope.expired():
            self.ended_by = reason
            self.scope.reschedule(asyncio.get_running_loop().time())


class Forwarder:
    """Carries calls to engines. Its state is who is under way."""

    def __init__(
        self, admission: Admission, engines: EngineClient, meter: Meter, tracing: Tracing
    ) -> None:
        self.admission = admission
        self.meter = meter
        self.draining = False
        self._running: set[Exchange] = set()
        self._idle = asyncio.Event()
        self._engines = engines
        self._tracing = tracing

    @asynccontextmanager
    async def forward(self, call: Call) -> AsyncIterator[Reply]:
        """The reply to `call`. At the end of the block the engine is hung up on, unless it is done.

        Raises:
            GatewayError: there is no reply, or (inside of the block, from `Reply.next` or when time
                is up) none any more.
        """
        exchange = Exchange(call)
        record = exchange.record
        with self._tracing.span(call, record):
            self._running.add(exchange)
            self._idle.clear()
            try:
                async with exchange.scope:
                    reply = await self._reply(exchange)
                    yield reply
                record.status = reply.status
            except TimeoutError:
                if not exchange.scope.expired():
                    raise
                error = self._out_of_time(exchange)
                record.status, record.error = error.status, error.message
                raise error from None
            except GatewayError as error:
                record.status, record.error = error.status, error.message
                if isinstance(error, EngineBroke) and exchange.lease:
                    self.admission.suspect(exchange.lease)
                raise
            except (asyncio.CancelledError, ConnectionResetError):
                record.status = _CLIENT_LEFT
                raise
            finally:
                self._running.discard(exchange)
                if not self._running:
                    self._idle.set()
                self._leave_place(exchange)
                self.meter.finished(record)

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls; let those that run finish, but end them after `timeout_s`."""
        self.draining = True
        if not self._running:
            return
        _log.info("draining: %d requests run", len(self._running))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        for exchange in self._running:
            exchange.end(shutting_down())
        if self._running:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), _LAST_WORDS_S)

    def rejected(self, record: Record, error: GatewayError) -> None:
        """Account for a request that was refused before it became a call."""
        record.status, record.error = error.status, error.message
        self.meter.finished(record)

    async def _reply(self, exchange: Exchange) -> Reply:
        if self.draining:
            raise shutting_down()
        exchange.record.model = self.admission.resolve(exchange.call.model).name
        await self._take_place(exchange)
        while True:
            try:
                return await self._ask(exchange)
            except (EngineUnreachable, EngineBroke) as error:
                await self._move_on(exchange, error)

    async def _ask(self, exchange: Exchange) -> Reply:
        call, record, lease = exchange.call, exchange.record, exchange.lease
        if lease is None:  # `_take_place` has seen to it
            raise GatewayError("asked without a place at an engine")
        endpoint = lease.endpoint
        record.variant, record.endpoint = endpoint.variant, endpoint.key
        record.attempts += 1
        exchange.answer = await self._engines.post(
            endpoint,
            call.path,
            call.body_for(endpoint.served_model_name or endpoint.model),
            {**call.headers, "x-request-id": call.request_id},
        )
        if exchange.answer.status in _RETRIED_STATUSES and self._moved_after_status(exchange):
            return await self._ask(exchange)
        reply = Reply(exchange.answer, record)
        await reply.begin()
        return reply

    async def _take_place(self, exchange: Exchange) -> None:
        model = exchange.record.model
        lease = self.admission.try_acquire(model, exchange.tried)
        if lease is None:
            since = time.monotonic()
            try:
                with self.meter.queued(model):
                    lease = await self.admission.wait(model, exchange.tried)
            finally:
                exchange.record.queued_s += time.monotonic() - since
        self._occupy(exchange, lease)

    def _occupy(self, exchange: Exchange, lease: Lease) -> None:
        exchange.lease = lease
        self.meter.at_engine(exchange.record.model, lease.endpoint.variant, 1)

    def _leave_place(self, exchange: Exchange) -> None:
        """Hang up on the engine and free its place, if there is one."""
        if exchange.answer:
            exchange.answer.close()
            exchange.answer = None
        if exchange.lease:
            self.meter.at_engine(exchange.record.model, exchange.lease.endpoint.variant, -1)
            self.admission.release(exchange.lease)
            exchange.lease = None

    async def _move_on(self, exchange: Exchange, error: GatewayError) -> None:
        """To an endpoint that has not failed yet, waiting for one if somebody replaces the lost.

        Raises:
            GatewayError: `error` again, if there is none and will be none, or after enough attempts.
        """
        model = exchange.record.model
        if exchange.lease:
            self.admission.suspect(exchange.lease)
            exchange.tried.add(exchange.lease.endpoint.key)
        self._leave_place(exchange)
        if exchange.record.attempts >= self.admission.limits.max_attempts:
            raise error
        managed = self.admission.resolve(model).managed
        if not managed and not self.admission.router.can_serve(model, exchange.tried):
            raise error
        self.meter.retried(model, error.code or "")
        await self._take_place(exchange)

    def _moved_after_status(self, exchange: Exchange) -> bool:
        """Whether the call has now, for the first time, a place at another endpoint that was free."""
        if exchange.moved or not exchange.lease or not exchange.answer:
            return False
        if exchange.record.attempts >= self.admission.limits.max_attempts:
            return False
        tried = exchange.tried | {exchange.lease.endpoint.key}
        other = self.admission.try_acquire(exchange.record.model, tried)
        if other is None:
            return False
        self.meter.retried(exchange.record.model, str(exchange.answer.status))
        exchange.moved, exchange.tried = True, tried
        self._leave_place(exchange)
        self._occupy(exchange, other)
        return True

    def _out_of_time(self, exchange: Exchange) -> GatewayError:
        model = exchange.record.model
        if exchange.ended_by:
            return exchange.ended_by
        if not exchange.lease and not self.admission.router.can_serve(model, exchange.tried):
            return self.admission.no_replica(model)
        return DeadlineExceeded(f"not finished within {exchange.call.timeout_s:g} s")


def shutting_down() -> Unavailable:
    """What clients hear from a gateway that is about to end."""
    return Unavailable("the gateway is shutting down", retry_after_s=1)
