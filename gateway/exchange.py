"""Exchange: one call, from admission through routing, retries and migration to its last byte.

A state machine: engines, clients and timers call it, and it never blocks. Tasks exist only while a
request waits for a place or for a connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from gateway.accounts import Visit
from gateway.answer import Answer
from gateway.call import Call
from gateway.engine_connection import EngineConnection
from gateway.engine_request import engine_request, transcript_of
from gateway.errors import (
    DeadlineExceeded,
    EngineBroke,
    EngineUnreachable,
    GatewayError,
    NotSupported,
)
from gateway.missing_path import refuse_if_missing
from gateway.plant import Client, Plant, shutting_down
from gateway.prefill_leg import PrefillLeg, prefill_leg
from gateway.record import Record
from gateway.recovery import RETRIED_STATUSES, Recovery, is_hopeless, refusal
from gateway.relay import Relay
from gateway.reply import Renamer, header_lines, lines_of_ours, one_of_ours, renamer
from gateway.routing import Lease
from gateway.tenants import ANONYMOUS
from gateway.usage import find_usage

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_log = logging.getLogger(__name__)
_CLIENT_LEFT = 499
_EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-store\r\n"
_HEARTBEAT = b": the request waits\n\n"


class Exchange:
    """Carries `call` to an engine and its answer to `client`. Hears of both, see `Listener`."""

    __slots__ = (
        *("_answer", "_call", "_client", "_client_is_slow", "_connection", "_heartbeat", "_lease"),
        *("_over", "_plant", "_recovery", "_relay", "_span", "_started", "_task", "_timer"),
        *("_visit", "received", "record"),
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
        self._lease: Lease | None = None
        self._connection: EngineConnection | None = None
        self._answer = Answer()
        self._relay: Relay | None = None
        self._recovery: Recovery | None = None  # nothing has gone wrong
        self._started = False  # the client has a status
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
            self._start_heartbeat()
        if lease is not None:
            self._occupy(lease)
            self._ask()
        elif is_hopeless(plant, self.record.model):
            self._fail(plant.admission.no_replica(self.record.model))
        else:
            self._run(self._take_place)

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
        relay, lease, admission = self._relay, self._lease, self._plant.admission
        if relay is None or lease is None or self._connection is None or self._client_is_slow:
            return
        since, patience_s = relay.last_at, admission.limits.stall_timeout_s
        if self._recovery is not None:
            since, patience_s = self._recovery.patience(since)
        if not relay.wrote or now - since <= patience_s:
            return
        if admission.router.can_serve(self.record.model, {lease.endpoint.key}):
            self._recover().stalled()
            self.give_up(f"it was silent for {patience_s:g} s")

    def give_up(self, reason: str) -> None:
        """Leave the engine that this is at, and go on elsewhere."""
        if self._lease is None or self._over:
            return
        self._stop_task()
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
        if self._started:
            self._was_refused(answer, body)
            return
        if answer.status in RETRIED_STATUSES and self._moved_after_status(answer.status):
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
        lease = self._lease
        if lease is None:
            return
        if self._started:
            if answer.status != 200 or not answer.is_event_stream:
                self._hang_up()
                self._was_refused(answer, b"")
                return
        elif answer.status in RETRIED_STATUSES and self._moved_after_status(answer.status):
            return
        self._answer = answer
        relay = self._relay
        if relay is None or not relay.wrote:  # what an engine before said to nobody counts no more
            relay = self._new_relay(lease) if answer.is_event_stream else None
            self._relay = relay
        elif self._recovery is not None:
            self._recovery.goes_on(relay)
            self._stop_heartbeat()
        self.received = self._write_first if relay is None else relay.feed

    def ended(self) -> None:
        """The stream is complete."""
        relay, lease = self._relay, self._lease
        self._connection = None
        if relay is not None:
            relay.end()
            if self._over or self._lease is not lease:
                return  # its last words told of a fault
            if not relay.is_whole:
                said = "before its answer was whole" if relay.wrote else "and said nothing"
                self.broke(EngineBroke(f"the engine at {self.record.endpoint} ended {said}"))
                return
        elif not self._started:
            self._start_client()
        self._complete()

    def stale(self) -> None:
        """The pooled connection was closed already: that is no failure."""
        self._connection = None
        self._run(self._connect)

    def broke(self, error: GatewayError) -> None:
        """The engine broke off, or cannot be reached."""
        self._connection = None
        if not self._over:
            self._go_elsewhere(error, error)

    # How it goes on

    def _was_refused(self, answer: Answer, body: bytes) -> None:
        """An answer has begun, and an engine says something that cannot be a part of it."""
        status, wrote = answer.status, self._relay is not None and self._relay.wrote
        error = refusal(status, body, wrote=wrote)
        if status in RETRIED_STATUSES:
            self._go_elsewhere(error, status)
        else:
            self._fail(error)

    def _go_elsewhere(self, error: GatewayError, fault: GatewayError | int) -> None:
        if self._lease is not None:
            self._recover().lost(self._lease, fault)
        self._leave_place()
        try:
            self._recover_from(error)
        except GatewayError as final:
            self._fail(final)

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

    def _ask(self, *, after_leg: bool = False) -> None:
        lease, record = self._lease, self.record
        if lease is None:
            return
        endpoint = lease.endpoint
        record.variant, record.endpoint = endpoint.variant, endpoint.key
        if endpoint.role != "whole" and not after_leg:
            leg = prefill_leg(self._plant, self._call, lease, record, self._span)
            if leg is not None:
                self._run(partial(self._take_leg, leg))
                return
        record.attempts += 1
        connection = self._plant.engines.take(endpoint)
        if connection is None:
            self._run(self._connect)
        else:
            self._send(connection)

    async def _take_leg(self, leg: PrefillLeg) -> None:
        await leg.run()
        self._task = None
        self._ask(after_leg=True)

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
        if self._recovery is not None:
            lease.rewrite, self._recovery.asked_at = self._recovery.migration, time.monotonic()
        try:
            head, body = engine_request(call, lease)
        except GatewayError as error:
            connection.abort()
            self._fail(error)
            return
        self._connection = connection
        if self._client_is_slow:
            connection.pause()
        connection.ask(head, body, self)

    def _new_relay(self, lease: Lease) -> Relay:
        return Relay(
            self.record,
            self._write_first,
            transcript=transcript_of(self._call, lease, len(self._plant.running)),
            rename=self._renamer(),
            on_fault=self._told_of_fault,
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
            self._relay.write_chunks = self._client.write_chunks
            if self._connection is not None:
                self._connection.take_chunks = self._relay.feed_chunks
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

    def _start_heartbeat(self) -> None:
        if self._heartbeat is None:
            beat_s = self._plant.admission.limits.heartbeat_s
            self._heartbeat = self._plant.loop.call_later(beat_s, self._beat, beat_s)

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

    @property
    def _tried(self) -> Collection[str]:
        return self._recovery.tried if self._recovery is not None else ()

    def _recover(self) -> Recovery:
        if self._recovery is None:
            self._recovery = Recovery(self._plant, self._call, self.record)
        return self._recovery

    def _recover_from(self, error: GatewayError) -> None:
        """Go on elsewhere.

        Raises:
            GatewayError: there is nowhere to go, or it would not be faithful.
        """
        relay, recovery = self._relay, self._recover()
        if relay is None or not relay.wrote:
            recovery.retry(error)
            self._run(self._take_place)
            return
        pause_s = recovery.go_on(relay, error)
        if pause_s is None:
            self._complete()
        else:
            self._start_heartbeat()
            self._run(partial(self._take_place, pause_s))

    def _moved_after_status(self, status: int) -> bool:
        """Whether the call has now, for the first time, a place at another endpoint that was free."""
        if self._lease is None:
            return False
        self._plant.admission.failed(self._lease, status)
        if self._started:
            return False
        other = self._recover().place_after(status, self._lease)
        if other is not None:
            self._move(other)
        return other is not None

    def _fell_back(self, error: GatewayError) -> bool:
        """Whether another model, of those that may stand in for this one, takes the call instead."""
        if self._started:
            return False
        lease = self._recover().stand_in(error)
        if lease is None:
            return False
        self._move(lease, to_model=lease.endpoint.model)
        return True

    def _move(self, lease: Lease, to_model: str = "") -> None:
        """Leave the engine for the place `lease`."""
        self._stop_task()
        self._hang_up()
        self._leave_place()
        if to_model:
            self.record.model = to_model
            self.record.more_headers = one_of_ours("fallback", to_model)
        self._occupy(lease)
        self._ask()

    # How it ends

    def _out_of_time(self) -> None:
        admission, model = self._plant.admission, self.record.model
        error: GatewayError = DeadlineExceeded(f"not finished within {self._call.timeout_s:g} s")
        if self._lease is None and not admission.router.can_serve(model, self._tried):
            error = admission.no_replica(model)
        self._conclude(error)

    def _complete(self) -> None:
        self._leave()
        self._client.finish()

    def _fail(self, error: GatewayError) -> None:
        if not self._fell_back(error):
            self._conclude(error)

    def _conclude(self, error: GatewayError) -> None:
        self.record.status, self.record.error = error.status, error.message
        self.record.refusal = error.code or ""
        self._leave()
        self._client.fail(error)

    def _leave(self) -> None:
        plant, self._over = self._plant, True
        if self._timer is not None:
            self._timer.cancel()
        self._stop_heartbeat()
        self._stop_task()
        self._hang_up()
        self._leave_place()
        if self._relay is not None:
            self._relay.count()
        plant.access.leave(self._visit, self.record)
        plant.left(self)
        plant.meter.finished(self.record)
        if self._span is not None:
            plant.tracing.finish(self._span, self.record)

    def _stop_task(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

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

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._task = self._plant.loop.create_task(self._guarded(work))

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """The edge of a task: what goes wrong in it becomes the client's error."""
        try:
            await work()
        except GatewayError as error:
            self._task = None
            self.end(error)
        except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
            _log.exception("request %s failed", self._call.request_id)
            self._task = None
            self.end(GatewayError("internal error; the gateway's log has more"))
