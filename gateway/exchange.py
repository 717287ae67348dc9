"""Exchange: one call, from admission through routing and retries to its last byte."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType

from gateway.access import Access
from gateway.accounts import Visit
from gateway.admission import Admission
from gateway.answer import Answer
from gateway.call import Call
from gateway.engine import EngineClient
from gateway.errors import (
    DeadlineExceeded,
    EngineBroke,
    EngineUnreachable,
    GatewayError,
    Unavailable,
)
from gateway.metering import Meter
from gateway.record import Record
from gateway.reply import Reply
from gateway.routing import Lease
from gateway.tenants import ANONYMOUS
from gateway.tracing import Tracing

_CLIENT_LEFT = 499
# Answers that another replica may well not give.
_RETRIED_STATUSES = frozenset((500, 502, 503, 504))


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
    """`async with exchange as reply`: at the end of the block the engine is hung up on, unless done.

    Raises:
        GatewayError: there is no reply, or (inside of the block, when the engine breaks off or time
            is up) none any more.
    """

    __slots__ = (
        *("_answer", "_call", "_ended_by", "_lease", "_moved", "_over", "_plant", "_reply"),
        *("_span", "_task", "_timer", "_tried", "_visit", "record"),
    )

    def __init__(self, plant: Plant, call: Call) -> None:
        self.record = Record(api=call.api, path=call.path, request_id=call.request_id)
        if call.tenant is not ANONYMOUS:
            self.record.tenant = call.tenant.name
        self._visit: Visit | None = None
        self._plant = plant
        self._call = call
        self._tried: set[str] = set()
        self._lease: Lease | None = None
        self._answer: Answer | None = None
        self._reply: Reply | None = None
        self._moved = False  # once after an engine's 5xx
        self._over = False  # time is up, or the gateway ends
        self._ended_by: GatewayError | None = None
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._span: AbstractContextManager[None] | None = None

    def end(self, reason: GatewayError | None = None) -> None:
        """Stop it now, with `reason` as the client's error; None: its time is up."""
        if not self._over and self._task is not None:
            self._over, self._ended_by = True, reason
            self._task.cancel()

    async def __aenter__(self) -> Reply:
        plant = self._plant
        plant.running.add(self)
        self._task = asyncio.current_task(plant.loop)
        if self._call.timeout_s is not None:
            self._timer = plant.loop.call_later(self._call.timeout_s, self.end)
        if plant.tracing.enabled:
            self._span = plant.tracing.span(self._call, self.record)
            self._span.__enter__()
        try:
            self._reply = await self._replied()
        except BaseException as error:
            told = self._close(error)
            if told is error:
                raise
            raise told from None
        return self._reply

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if error is None:
            if self._reply is not None:
                self.record.status = self._reply.status
            self._leave(None)
        elif (told := self._close(error)) is not error:
            raise told from None

    def _close(self, error: BaseException) -> BaseException:
        """End with `error`; returns what the client should hear in its stead."""
        record = self.record
        if self._over and isinstance(error, asyncio.CancelledError) and self._task is not None:
            self._task.uncancel()
            error = self._out_of_time()
        if isinstance(error, GatewayError):
            record.status, record.error = error.status, error.message
            record.refusal = error.code or ""
            if isinstance(error, EngineBroke) and self._lease:
                self._plant.admission.suspect(self._lease)
        elif isinstance(error, asyncio.CancelledError):
            record.status = _CLIENT_LEFT
        self._leave(error)
        return error

    def _leave(self, error: BaseException | None) -> None:
        plant = self._plant
        if self._timer is not None:
            self._timer.cancel()
        plant.running.discard(self)
        if plant.draining and not plant.running:
            plant.idle.set()
        self._leave_place()
        plant.access.leave(self._visit, self.record)
        plant.meter.finished(self.record)
        if self._span is not None:
            self._span.__exit__(type(error) if error else None, error, None)

    async def _replied(self) -> Reply:
        plant = self._plant
        if plant.draining:
            raise shutting_down()
        served = plant.admission.resolve(self._call.model, self._call.tenant)
        self.record.model = served.name
        self._visit = plant.access.enter(self._call, served)
        lease = plant.admission.try_acquire(self.record.model, call=self._call)
        if lease is not None:
            self._occupy(lease)
        else:
            await self._take_place()
        while True:
            try:
                return await self._ask()
            except (EngineUnreachable, EngineBroke) as error:
                await self._move_on(error)

    async def _ask(self) -> Reply:
        call, record, lease = self._call, self.record, self._lease
        if lease is None:  # `_take_place` has seen to it
            raise GatewayError("asked without a place at an engine")
        endpoint = lease.endpoint
        record.variant, record.endpoint = endpoint.variant, endpoint.key
        record.attempts += 1
        self._answer = answer = await self._plant.engines.post(
            endpoint,
            call.path,
            call.body_for(endpoint.served_model_name or endpoint.model),
            {**call.headers, "x-request-id": call.request_id},
        )
        if answer.status in _RETRIED_STATUSES and self._moved_after_status(answer.status):
            return await self._ask()
        return Reply(answer, record)

    async def _take_place(self) -> None:
        admission, model = self._plant.admission, self.record.model
        lease = admission.try_acquire(model, self._tried, self._call)
        if lease is None:
            since = time.monotonic()
            try:
                with self._plant.meter.queued(model):
                    lease = await admission.wait(model, self._tried, self._call)
            finally:
                self.record.queued_s += time.monotonic() - since
        self._occupy(lease)

    def _occupy(self, lease: Lease) -> None:
        self._lease = lease
        self._plant.meter.at_engine(self.record.model, lease.endpoint.variant, 1)

    def _leave_place(self) -> None:
        """Hang up on the engine and free its place, if there is one."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None
        lease, self._lease = self._lease, None
        if lease is not None:
            self._plant.meter.at_engine(self.record.model, lease.endpoint.variant, -1)
            self._plant.admission.release(lease)

    async def _move_on(self, error: GatewayError) -> None:
        """To an endpoint that has not failed yet, waiting for one if somebody replaces the lost.

        Raises:
            GatewayError: `error` again, if there is none and will be none, or after enough attempts.
        """
        admission, model = self._plant.admission, self.record.model
        if self._lease is not None:
            admission.suspect(self._lease)
            self._tried.add(self._lease.endpoint.key)
        self._leave_place()
        if self.record.attempts >= admission.limits.max_attempts:
            raise error
        managed = admission.resolve(model).managed
        if not managed and not admission.router.can_serve(model, self._tried):
            raise error
        self._plant.meter.retried(model, error.code or "")
        await self._take_place()

    def _moved_after_status(self, status: int) -> bool:
        """Whether the call has now, for the first time, a place at another endpoint that was free."""
        admission, model = self._plant.admission, self.record.model
        if self._moved or self._lease is None:
            return False
        if self.record.attempts >= admission.limits.max_attempts:
            return False
        tried = self._tried | {self._lease.endpoint.key}
        other = admission.try_acquire(model, tried, self._call)
        if other is None:
            return False
        self._plant.meter.retried(model, str(status))
        self._moved, self._tried = True, tried
        self._leave_place()
        self._occupy(other)
        return True

    def _out_of_time(self) -> GatewayError:
        admission, model = self._plant.admission, self.record.model
        if self._ended_by is not None:
            return self._ended_by
        if self._lease is None and not admission.router.can_serve(model, self._tried):
            return admission.no_replica(model)
        return DeadlineExceeded(f"not finished within {self._call.timeout_s:g} s")


def shutting_down() -> Unavailable:
    """What clients hear from a gateway that is about to end."""
    return Unavailable("the gateway is shutting down", retry_after_s=1)
