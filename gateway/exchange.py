"""Exchange: one call, from admission through routing, retries and migration to its last byte.

A state machine: engines, clients and timers call it, and it never blocks. `Upstream` is where the
call is asked, `Opening` the beginning of its answer, `Relay` the rest of a streamed one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.accounts import Visit
from gateway.answer import Answer
from gateway.call import Call
from gateway.engine_request import transcript_of
from gateway.errors import DeadlineExceeded, EngineBroke, GatewayError, NotSupported
from gateway.llamacpp_dialect import CACHE_IS_FULL, translated
from gateway.missing_path import refuse_if_missing
from gateway.opening import Opening
from gateway.plant import Client, Plant, shutting_down
from gateway.record import Record
from gateway.recovery import RETRIED_STATUSES, is_hopeless, refusal
from gateway.relay import Relay
from gateway.reply import header_lines, one_of_ours
from gateway.routing import Lease
from gateway.tenants import ANONYMOUS
from gateway.upstream import Upstream
from gateway.usage import find_usage

_CLIENT_LEFT = 499


def _heard_too_late(_data: bytes) -> None:
    """The call is over. As it refers to nothing that refers to it, it is freed at once."""


class Exchange:
    """Carries `call` to an engine and its answer to `client`. Hears of both, see `Listener`."""

    __slots__ = (
        *("_call", "_client", "_opening", "_over", "_plant", "_relay", "_timer", "_upstream"),
        *("_visit", "received", "record"),
    )

    def __init__(self, plant: Plant, call: Call, client: Client) -> None:
        self.record = record = Record(api=call.api, path=call.path, request_id=call.request_id)
        if call.tenant is not ANONYMOUS:
            record.tenant = call.tenant.name
        self._visit: Visit | None = None
        self.received: Callable[[bytes], None] = client.write
        self._plant = plant
        self._call = call
        self._client = client
        self._upstream = Upstream(plant, call, record, self)
        self._opening = Opening(plant, client, record)
        self._relay: Relay | None = None
        self._over = False
        self._timer: asyncio.TimerHandle | None = None

    # What clients and the gateway do

    def begin(self) -> None:
        """Set out. The client may have its answer before this returns."""
        plant, call = self._plant, self._call
        plant.running.add(self)
        if call.timeout_s is not None:
            self._timer = plant.loop.call_later(call.timeout_s, self._out_of_time)
        if plant.tracing.enabled:
            self._upstream.span = plant.tracing.start(call)
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
            self._opening.start_heartbeat()
        if lease is not None:
            self._upstream.go(lease)
        elif is_hopeless(plant, self.record.model):
            self._fail(plant.admission.no_replica(self.record.model))
        else:
            self._upstream.wait()

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
        self._upstream.pause()

    def resume(self) -> None:
        """The client keeps up again."""
        if self._relay is not None:
            self._relay.last_at = time.monotonic()
        self._upstream.resume()

    def check(self, now: float) -> None:
        """Called every second: leave an engine that fell silent in a stream, if another is free.

        The engine may only be busy: so each time it must be silent for twice as long.
        """
        relay, upstream, admission = self._relay, self._upstream, self._plant.admission
        lease = upstream.lease
        if relay is None or lease is None or upstream.connection is None or upstream.is_paused:
            return
        since, patience_s = relay.last_at, admission.limits.stall_timeout_s
        if upstream.recovery is not None:
            since, patience_s = upstream.recovery.patience(since)
        if not relay.wrote or now - since <= patience_s:
            return
        if admission.router.can_serve(self.record.model, {lease.endpoint.key}):
            upstream.recover().stalled()
            self.give_up(f"it was silent for {patience_s:g} s")

    def give_up(self, reason: str, status: int | None = None) -> None:
        """Leave the engine that this is at, and go on elsewhere. `status`: what it meant, if it told."""
        upstream = self._upstream
        if upstream.lease is None or self._over:
            return
        upstream.stop_waiting()
        upstream.hang_up()
        key = upstream.lease.endpoint.key
        error = EngineBroke(f"the engine at {key} was left: {reason}")
        self._go_elsewhere(error, status or error)

    def is_at(self, endpoint_key: str) -> bool:
        """Whether it has a place at that endpoint."""
        lease = self._upstream.lease
        return lease is not None and lease.endpoint.key == endpoint_key

    # What an engine says

    def answered(self, answer: Answer, body: bytes) -> None:
        """All of a JSON answer."""
        self._upstream.connection = None
        answer, body = translated(answer, body, self._call.path, self._upstream.lease)
        try:
            refuse_if_missing(answer.status, body, self.record)
        except NotSupported as error:
            self._fail(error)
            return
        if self._opening.is_done:
            self._was_refused(answer, body)
            return
        if answer.status in RETRIED_STATUSES and self._moved_after_status(answer.status):
            return
        record, rename = self.record, self._upstream.renamer
        record.status, record.usage = answer.status, find_usage(body)
        if record.usage is None and answer.status < 400:
            record.answer_chunks = len(body) // 4  # bytes per token, about
        headers = header_lines(answer, record)
        self._leave()  # first, so that this client's next request finds the place free
        self._client.whole(answer.status, headers, rename(body) if rename else body)

    def began(self, answer: Answer) -> None:
        """The first bytes of a stream come next."""
        upstream, opening = self._upstream, self._opening
        lease = upstream.lease
        if lease is None:
            return
        if opening.is_done:
            if answer.status != 200 or not answer.is_event_stream:
                upstream.hang_up()
                self._was_refused(answer, b"")
                return
        elif answer.status in RETRIED_STATUSES and self._moved_after_status(answer.status):
            return
        opening.answer = answer
        relay = self._relay
        if relay is None or not relay.wrote:  # what an engine before said to nobody counts no more
            relay = self._new_relay(lease) if answer.is_event_stream else None
            self._relay = relay
        elif upstream.recovery is not None:
            upstream.recovery.goes_on(relay)
            opening.stop_heartbeat()
        self.received = self._write_first if relay is None else relay.feed

    def ended(self) -> None:
        """The stream is complete."""
        relay, upstream = self._relay, self._upstream
        lease = upstream.lease
        upstream.connection = None
        if relay is not None:
            relay.end()
            if self._over or upstream.lease is not lease:
                return  # its last words told of a fault
            if not relay.is_whole:
                said = "before its answer was whole" if relay.wrote else "and said nothing"
                self.broke(EngineBroke(f"the engine at {self.record.endpoint} ended {said}"))
                return
        elif not self._opening.is_done:
            self._opening.start()
        self._complete()

    def stale(self) -> None:
        """The pooled connection was closed already: that is no failure."""
        self._upstream.reconnect()

    def broke(self, error: GatewayError) -> None:
        """The engine broke off, or cannot be reached."""
        self._upstream.connection = None
        if not self._over:
            self._go_elsewhere(error, error)

    # What the client gets of a stream

    def _new_relay(self, lease: Lease) -> Relay:
        return Relay(
            self.record,
            self._write_first,
            transcript=transcript_of(self._call, lease, len(self._plant.running)),
            rename=self._upstream.renamer,
            on_fault=self._told_of_fault,
        )

    def _write_first(self, data: bytes) -> None:
        """The first bytes of an answer: from now on there is no other."""
        if not self._opening.is_done:
            self._opening.start()
        self._opening.stop_heartbeat()
        relay, connection, write = self._relay, self._upstream.connection, self._client.write
        if relay is not None:
            self.record.ttft_s = self.record.age_s
            relay.write = write
            relay.write_chunks = self._client.write_chunks
            if connection is not None:
                connection.take_chunks = relay.feed_chunks
        else:
            self.received = write
        write(data)

    def _told_of_fault(self) -> None:
        relay = self._relay
        transcript = relay.transcript if relay is not None else None
        if transcript is not None and not self._over:
            fault = transcript.fault or ""
            self.give_up(fault, 503 if CACHE_IS_FULL in fault else None)

    # How it goes on when that engine does not

    def _was_refused(self, answer: Answer, body: bytes) -> None:
        """An answer has begun, and an engine says something that cannot be a part of it."""
        status, wrote = answer.status, self._relay is not None and self._relay.wrote
        error = refusal(status, body, wrote=wrote)
        if status in RETRIED_STATUSES:
            self._go_elsewhere(error, status)
        else:
            self._fail(error)

    def _go_elsewhere(self, error: GatewayError, fault: GatewayError | int) -> None:
        upstream = self._upstream
        if upstream.lease is not None:
            upstream.recover().lost(upstream.lease, fault)
        upstream.leave_place()
        try:
            self._recover_from(error)
        except GatewayError as final:
            self._fail(final)

    def _recover_from(self, error: GatewayError) -> None:
        """Go on elsewhere.

        Raises:
            GatewayError: there is nowhere to go, or it would not be faithful.
        """
        relay, recovery = self._relay, self._upstream.recover()
        if relay is None or not relay.wrote:
            recovery.retry(error)
            self._upstream.wait()
            return
        pause_s = recovery.go_on(relay, error)
        if pause_s is None:
            self._complete()
        else:
            self._opening.start_heartbeat()
            self._upstream.wait(pause_s)

    def _moved_after_status(self, status: int) -> bool:
        """Whether the call has now, for the first time, a place at another endpoint that was free."""
        upstream = self._upstream
        if upstream.lease is None:
            return False
        self._plant.admission.failed(upstream.lease, status)
        if self._opening.is_done:
            return False
        other = upstream.recover().place_after(status, upstream.lease)
        if other is not None:
            upstream.leave()
            upstream.go(other)
        return other is not None

    def _fell_back(self, error: GatewayError) -> bool:
        """Whether another model, of those that may stand in for this one, takes the call instead."""
        if self._opening.is_done:
            return False
        upstream = self._upstream
        lease = upstream.recover().stand_in(error)
        if lease is None:
            return False
        upstream.leave()
        self.record.model = lease.endpoint.model
        self.record.more_headers = one_of_ours("fallback", lease.endpoint.model)
        upstream.go(lease)
        return True

    # How it ends

    def _out_of_time(self) -> None:
        admission, model, upstream = self._plant.admission, self.record.model, self._upstream
        error: GatewayError = DeadlineExceeded(f"not finished within {self._call.timeout_s:g} s")
        if upstream.lease is None and not admission.router.can_serve(model, upstream.tried):
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
        plant, upstream, self._over = self._plant, self._upstream, True
        if self._timer is not None:
            self._timer.cancel()
        self._opening.stop_heartbeat()
        upstream.close()
        if self._relay is not None:
            self._relay.count()
            self._relay, self.received = None, _heard_too_late
        plant.access.leave(self._visit, self.record)
        plant.left(self)
        plant.meter.finished(self.record)
        if upstream.span is not None:
            plant.tracing.finish(upstream.span, self.record)
