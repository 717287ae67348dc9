"""Exchange: one call, from admission through routing, retries and migration to its last byte.

A state machine: engines, clients and timers call it, and it never blocks. Tasks exist only while a
request waits for a place or for a connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from gateway.access import Access, may_use
from gateway.accounts import Visit
from gateway.admission import Admission
from gateway.answer import Answer
from gateway.call import Call, parse_object
from gateway.continuation import CHAT_PATH, CannotContinue, can_be_continued, num_held
from gateway.engine import EngineClient, request_head
from gateway.engine_connection import EngineConnection
from gateway.errors import (
    DeadlineExceeded,
    EngineBroke,
    EngineUnreachable,
    GatewayError,
    NotSupported,
    Overloaded,
    Unavailable,
)
from gateway.metering import Meter
from gateway.migration import Migration
from gateway.missing_path import refuse_if_missing
from gateway.record import Record
from gateway.relay import Relay
from gateway.reply import Renamer, header_lines, lines_of_ours, renamer
from gateway.routing import Lease
from gateway.tenants import ANONYMOUS
from gateway.tracing import Tracing
from gateway.transcript import Transcript
from gateway.usage import find_usage

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_log = logging.getLogger(__name__)
_CLIENT_LEFT = 499
# Answers that another replica may well not give.
_RETRIED_STATUSES = frozenset((429, 500, 502, 503, 504))
_NO_ENGINE = (Unavailable, Overloaded, EngineBroke)
_EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-store\r\n"
_ASK_FOR_IDS = b',"return_token_ids":true}'
_LONGEST_WITH_IDS_BYTES = 512 * 1024  # else the ids of the prompt would delay the first token
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0  # between attempts to go on with a stream
_HEARTBEAT = b": the request waits\n\n"


class Client(Protocol):
    """Who asked. Gets either a `whole` answer, or `start`, `write` ... and `finish`.

    `fail` may come at any time, and ends it.
    """

    @property
    def write(self) -> Callable[[bytes], None]:
        """Takes a part of a body, not empty."""

    def whole(self, status: int, headers: bytes, body: bytes) -> None:
        """All of an answer. `headers` are lines that each end in CRLF."""

    def start(self, status: int, headers: bytes, *, is_event_stream: bool) -> None:
        """The head of an answer whose body comes with `write`, up to `finish`."""

    def finish(self) -> None:
        """The body is complete."""

    def fail(self, error: GatewayError) -> None:
        """There is no answer, or no more of it."""


@dataclass(slots=True)
class Plant:
    """What all exchanges share. `running` are those under way."""

    admission: Admission
    engines: EngineClient
    meter: Meter
    tracing: Tracing
    access: Access
    loop: asyncio.AbstractEventLoop
    draining: bool = False
    running: set[Exchange] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Exchange:
    """Carries `call` to an engine and its answer to `client`. Hears of both, see `Listener`."""

    __slots__ = (
        *(
            "_answer",
            "_call",
            "_client",
            "_client_is_slow",
            "_connection",
            "_heartbeat",
            "_lease",
            "_lost",
        ),
        *(
            "_migration",
            "_moved",
            "_num_misses",
            "_num_stalls",
            "_over",
            "_plant",
            "_relay",
            "_span",
            "_started",
        ),
        *("_stranded_at", "_task", "_timer", "_tried", "_visit", "received", "record"),
    )

    def __init__(self, plant: Plant, call: Call, client: Client) -> None:
        self.record = Record(api=call.api, path=call.path, request_id=call.request_id)
        if call.tenant is not ANONYMOUS:
            self.record.tenant = call.tenant.name
        self._visit: Visit | None = None
        self.received: Callable[[bytes], None] = client.write
        self._plant = plant
        self._call = call
        self._client = client
        self._tried: set[str] = set()
        self._lease: Lease | None = None
        self._lost = ""  # the endpoint that failed last
        self._connection: EngineConnection | None = None
        self._answer = Answer()
        self._relay: Relay | None = None
        self._migration: Migration | None = None
        self._started = False  # the client has a status
        self._moved = False  # once after an engine's 5xx
        self._stranded_at = 0.0  # when a stream lost its engine; 0: it has one
        self._num_stalls = 0  # engines that were left because they fell silent
        self._num_misses = 0  # engines that did not go on with it since
        self._over = self._client_is_slow = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._span: Span | None = None

    # What clients and the gateway do

    def begin(self) -> None:
        """Set out. The client may have its answer before this returns."""
        plant, call = self._plant, self._call
        plant.running.add(self)
        if call.timeout_s is not None:
            self._timer = plant.loop.call_later(call.timeout_s, self._out_of_time)
        if plant.tracing.enabled:
            self._span = plant.tracing.start(call)
        try:
            if plant.draining:
                raise shutting_down()
            served = plant.admission.resolve(call.model, call.tenant)
            self.record.model = served.name
            self._visit = plant.access.enter(call, served)
            lease = plant.admission.try_acquire(self.record.model, call=call)
        except GatewayError as error:
            self._fail(error)
            return
        if call.is_stream:
            beat_s = plant.admission.limits.heartbeat_s
            self._heartbeat = plant.loop.call_later(beat_s, self._beat, beat_s)
        if lease is not None:
            self._occupy(lease)
            self._ask()
        elif self._is_hopeless():
            self._fail(plant.admission.no_replica(self.record.model))
        else:
            self._run(self._take_place())

    def _is_hopeless(self) -> bool:
        """Nobody serves the model, waiting does not start it, and another may stand in for it."""
        admission, model = self._plant.admission, self.record.model
        return (
            bool(admission.router.fallbacks(model))
            and not admission.router.can_serve(model)
            and not admission.resolve(model).scalable
        )

    def end(self, reason: GatewayError) -> None:
        """Stop it now, with `reason` as the client's error."""
        if not self._over:
            self._fail(reason)

    def client_left(self) -> None:
        """Nobody waits for the answer any more."""
        if not self._over:
            self.record.status = _CLIENT_LEFT
            self._leave()

    def pause(self) -> None:
        """The client does not keep up."""
        self._client_is_slow = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """The client keeps up again."""
        self._client_is_slow = False
        if self._relay is not None:
            self._relay.last_at = time.monotonic()
        if self._connection is not None:
            self._connection.resume()

    def check(self, now: float) -> None:
        """Called every second: leave an engine that fell silent in a stream, if another is free.

        The engine may only be busy: so each time it must be silent for twice as long.
        """
        relay, lease, router = self._relay, self._lease, self._plant.admission.router
        if relay is None or lease is None or self._connection is None or self._client_is_slow:
            return
        patience_s = self._plant.admission.limits.stall_timeout_s * 2**self._num_stalls
        if not relay.wrote or now - relay.last_at <= patience_s:
            return
        if router.can_serve(self.record.model, {lease.endpoint.key}):
            self._num_stalls += 1
            self.give_up(f"it was silent for {patience_s:g} s")

    def give_up(self, reason: str) -> None:
        """Leave the engine that this is at, and go on elsewhere."""
        if self._lease is None or self._over:
            return
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._hang_up()
        key = self._lease.endpoint.key
        self.broke(EngineBroke(f"the engine at {key} was left: {reason}"))

    def is_at(self, endpoint_key: str) -> bool:
        """Whether it has a place at that endpoint."""
        return self._lease is not None and self._lease.endpoint.key == endpoint_key

    # What an engine says

    def answered(self, answer: Answer, body: bytes) -> None:
        """All of a JSON answer."""
        self._connection = None
        try:
            refuse_if_missing(answer.status, body, self.record)
        except NotSupported as error:
            self._fail(error)
            return
        if answer.status in _RETRIED_STATUSES and self._moved_after_status(answer.status):
            return
        if self._started:
            self._fail(_refused(answer, body))
            return
        record, rename = self.record, self._renamer()
        record.status, record.usage = answer.status, find_usage(body)
        if record.usage is None and answer.status < 400:
            record.answer_chunks = len(body) // 4  # bytes per token, about
        headers = header_lines(answer, record)
        self._leave()  # first, so that this client's next request finds the place free
        self._client.whole(answer.status, headers, rename(body) if rename else body)

    def began(self, answer: Answer) -> None:
        """The first bytes of a stream come next."""
        if answer.status in _RETRIED_STATUSES and self._moved_after_status(answer.status):
            return
        if self._started and not (answer.status == 200 and answer.is_event_stream):
            self._hang_up()
            self._fail(_refused(answer, b""))
            return
        self._answer = answer
        self.received = self._write_first
        if self._stranded_at:
            self._stranded_at, self._num_misses = 0.0, 0
            self.record.migrations += 1
            self._plant.meter.migrated(self.record.model)
        if answer.is_event_stream:
            if self._relay is None:
                self._relay = self._new_relay()
            self.received = self._relay.feed

    def ended(self) -> None:
        """The stream is complete."""
        relay, lease = self._relay, self._lease
        self._connection = None
        if relay is not None:
            relay.end()
            if self._over or self._lease is not lease:
                return  # its last words told of a fault
            if not relay.wrote:
                self.broke(EngineBroke(f"the engine at {self.record.endpoint} said nothing"))
                return
        elif not self._started:
            self._start_client()
        self._complete()

    def stale(self) -> None:
        """The pooled connection was closed already: that is no failure."""
        self._connection = None
        self._run(self._connect())

    def broke(self, error: GatewayError) -> None:
        """The engine broke off, or cannot be reached."""
        self._connection = None
        if self._over:
            return
        if self._lease is not None:
            self._plant.admission.failed(self._lease, error)
            self._tried.add(self._lease.endpoint.key)
            self._lost = self._lease.endpoint.key
        self._leave_place()
        try:
            if self._relay is not None and self._relay.wrote:
                self._migrate(error)
            else:
                self._move_on(error)
        except GatewayError as final:
            self._fail(final)

    # How it goes on

    async def _take_place(self, pause_s: float = 0.0) -> None:
        admission, model = self._plant.admission, self.record.model
        if pause_s:
            await asyncio.sleep(pause_s)
        lease = admission.try_acquire(model, self._tried, self._call)
        if lease is None:
            since = time.monotonic()
            try:
                with self._plant.meter.queued(model):
                    lease = await admission.wait(model, self._tried, self._call)
            finally:
                self.record.queued_s += time.monotonic() - since
        self._task = None
        self._occupy(lease)
        self._ask()

    def _occupy(self, lease: Lease) -> None:
        self._lease = lease
        self._plant.meter.at_engine(self.record.model, lease.endpoint.variant, 1)

    def _ask(self) -> None:
        lease, record = self._lease, self.record
        if lease is None:
            return
        endpoint = lease.endpoint
        record.variant, record.endpoint = endpoint.variant, endpoint.key
        record.attempts += 1
        connection = self._plant.engines.take(endpoint)
        if connection is None:
            self._run(self._connect())
        else:
            self._send(connection)

    async def _connect(self) -> None:
        if self._lease is None:
            return
        try:
            connection = await self._plant.engines.connect(self._lease.endpoint)
        except EngineUnreachable as error:
            self._task = None
            self.broke(error)
        else:
            self._task = None
            self._send(connection)

    def _send(self, connection: EngineConnection) -> None:
        lease, call = self._lease, self._call
        if lease is None or self._over:
            connection.abort()
            return
        endpoint = lease.endpoint
        name = endpoint.served_model_name or endpoint.model
        if self._migration is not None:
            try:
                path, body = self._migration.request(name, by_ids=tells_token_ids(lease))
            except CannotContinue as reason:
                connection.abort()
                self._fail(EngineBroke(f"its engine broke off, and it cannot go on: {reason}"))
                return
        else:
            path, body = call.path, call.body_at(endpoint)
            if self._hides_ids(lease):
                body = body.rstrip()[:-1] + _ASK_FOR_IDS
        headers = {**call.headers, "x-request-id": call.request_id}
        self._connection = connection
        if self._client_is_slow:
            connection.pause()
        connection.ask(request_head(endpoint, call.method, path, headers, len(body)), body, self)

    def _new_relay(self) -> Relay:
        call, lease = self._call, self._lease
        transcript = None
        if can_be_continued(call.path):
            hides_ids = lease is not None and self._hides_ids(lease)
            held = num_held(parse_object(call.body)) if b'"stop"' in call.body else 0
            transcript = Transcript(
                is_chat=call.path == CHAT_PATH, hides_ids=hides_ids, num_held=held
            )
        return Relay(
            self.record,
            self._write_first,
            transcript=transcript,
            rename=self._renamer(),
            on_fault=self._told_of_fault,
        )

    def _hides_ids(self, lease: Lease) -> bool:
        """Whether the engine is asked for token ids that the client does not want to see."""
        call = self._call
        return (
            call.is_stream
            and tells_token_ids(lease)
            and can_be_continued(call.path)
            and len(call.body) <= _LONGEST_WITH_IDS_BYTES
            and not call.wants_ids
        )

    def _write_first(self, data: bytes) -> None:
        """The first bytes of an answer: from now on there is no other."""
        if not self._started:
            self._start_client()
        self._stop_heartbeat()
        write = self._client.write
        if self._relay is not None:
            self.record.ttft_s = self.record.age_s
            self._relay.write = write
        else:
            self.received = write
        write(data)

    def _start_client(self) -> None:
        answer, record = self._answer, self.record
        self._started = True
        record.status = answer.status
        headers = header_lines(answer, record)
        self._client.start(answer.status, headers, is_event_stream=answer.is_event_stream)

    def _told_of_fault(self) -> None:
        relay = self._relay
        transcript = relay.transcript if relay is not None else None
        if transcript is not None and not self._over:
            self.give_up(transcript.fault or "")

    def _beat(self, beat_s: float) -> None:
        """Tell a client of a stream that nothing has come yet, so that no proxy hangs up."""
        if not self._started:
            self._started, self.record.status = True, 200
            self._client.start(
                200, _EVENT_STREAM + lines_of_ours(self.record), is_event_stream=True
            )
        self._client.write(_HEARTBEAT)
        self._heartbeat = self._plant.loop.call_later(beat_s, self._beat, beat_s)

    def _stop_heartbeat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None

    def _move_on(self, error: GatewayError) -> None:
        """To an endpoint that has not failed yet, waiting for one if somebody replaces the lost.

        Raises:
            GatewayError: `error` again, if there is none and will be none, or after enough attempts.
        """
        admission, model = self._plant.admission, self.record.model
        pinned = self._call.endpoint_key is not None
        if pinned or self.record.attempts >= admission.limits.max_attempts:
            raise error
        managed = admission.resolve(model).managed
        if not managed and not admission.router.can_serve(model, self._tried):
            raise error
        self._plant.meter.retried(model, error.code or "")
        self._run(self._take_place())

    def _moved_after_status(self, status: int) -> bool:
        """Whether the call has now, for the first time, a place at another endpoint that was free."""
        admission, model = self._plant.admission, self.record.model
        if self._lease is None:
            return False
        admission.failed(self._lease, status)
        if self._moved or self._started:
            return False
        if self.record.attempts >= admission.limits.max_attempts:
            return False
        tried = self._tried | {self._lease.endpoint.key}
        other = admission.try_acquire(model, tried, self._call)
        if other is None:
            return False
        self._plant.meter.retried(model, str(status))
        self._moved, self._tried = True, tried
        self._hang_up()
        self._leave_place()
        self._occupy(other)
        self._ask()
        return True

    def _migrate(self, error: GatewayError) -> None:
        """Go on elsewhere after what the client has so far.

        Raises:
            GatewayError: it cannot be continued faithfully, or there is nowhere to go.
        """
        record, relay, admission = self.record, self._relay, self._plant.admission
        limits, now = admission.limits, time.monotonic()
        if relay is None or record.migrations >= limits.max_migrations:
            raise error
        if not self._stranded_at:
            self._stranded_at = now
            try:
                if self._migration is None:
                    self._migration = Migration(self._call, relay)
                if self._migration.prepare():
                    self._complete()
                    return
            except CannotContinue as reason:
                raise EngineBroke(f"{error.message}; it cannot go on elsewhere: {reason}") from None
        else:
            self._num_misses += 1
        # Whoever failed before may be well again: only the last one is passed over.
        self._tried = {self._lost}
        elsewhere = admission.router.can_serve(record.model, self._tried)
        if not elsewhere and not admission.resolve(record.model).managed:
            raise error
        if now > self._stranded_at + limits.replacement_timeout_s:
            raise error
        pause_s = min(_FIRST_PAUSE_S * 2**self._num_misses, _LONGEST_PAUSE_S)
        self._run(self._take_place(pause_s if self._num_misses else 0.0))

    def _fell_back(self, error: GatewayError) -> bool:
        """Whether another model, of those that may stand in for this one, takes the call instead."""
        plant, record = self._plant, self.record
        if self._started or plant.draining or not isinstance(error, _NO_ENGINE):
            return False
        for name in plant.admission.router.fallbacks(self._call.model):
            lease = None
            if name != record.model and may_use(self._call.tenant, plant.admission.resolve(name)):
                lease = plant.admission.try_acquire(name, (), self._call)
            if lease is not None:
                self._hang_up()
                self._leave_place()
                plant.meter.retried(record.model, "fallback")
                record.model = record.fallback = name
                self._tried = set()
                self._occupy(lease)
                self._ask()
                return True
        return False

    # How it ends

    def _out_of_time(self) -> None:
        admission, model = self._plant.admission, self.record.model
        if self._lease is None and not admission.router.can_serve(model, self._tried):
            self.end(admission.no_replica(model))
        else:
            self.end(DeadlineExceeded(f"not finished within {self._call.timeout_s:g} s"))

    def _complete(self) -> None:
        self._leave()
        self._client.finish()

    def _fail(self, error: GatewayError) -> None:
        if self._fell_back(error):
            return
        self.record.status, self.record.error = error.status, error.message
        self.record.refusal = error.code or ""
        self._leave()
        self._client.fail(error)

    def _leave(self) -> None:
        plant, self._over = self._plant, True
        if self._timer is not None:
            self._timer.cancel()
        self._stop_heartbeat()
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._hang_up()
        self._leave_place()
        if self._relay is not None:
            self._relay.count()
        plant.access.leave(self._visit, self.record)
        plant.running.discard(self)
        if plant.draining and not plant.running:
            plant.idle.set()
        plant.meter.finished(self.record)
        if self._span is not None:
            plant.tracing.finish(self._span, self.record)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def _leave_place(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            self._plant.meter.at_engine(self.record.model, lease.endpoint.variant, -1)
            self._plant.admission.release(lease, None if self.record.migrations else self.record)

    def _renamer(self) -> Renamer | None:
        if self._lease is None:
            return None
        endpoint = self._lease.endpoint
        return renamer(endpoint.served_model_name or endpoint.model, self._call.model)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self._plant.loop.create_task(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """The edge of a task: what goes wrong in it becomes the client's error."""
        try:
            await work
        except GatewayError as error:
            self._task = None
            self.end(error)
        except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
            _log.exception("request %s failed", self._call.request_id)
            self._task = None
            self.end(GatewayError("internal error; the gateway's log has more"))


def tells_token_ids(lease: Lease) -> bool:
    """Whether the engine there tells token ids when asked, and takes them as a prompt."""
    return lease.state.engine in {"vllm", "sim"}


def shutting_down() -> Unavailable:
    """What clients hear from a gateway that is about to end."""
    return Unavailable("the gateway is shutting down", retry_after_s=1)


def _refused(answer: Answer, body: bytes) -> EngineBroke:
    """For a client whose answer has begun: what its engine, or the next one, says instead."""
    return EngineBroke(
        f"the engine answered {answer.status}: {body[:300].decode(errors='replace')}"
    )
