"""Upstream: where a call is asked: its place at an endpoint, and its connection to the engine there.

Both may have to be waited for: then, and only then, a task of the call exists.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from gateway.answer import Listener
from gateway.call import Call
from gateway.engine_connection import EngineConnection
from gateway.engine_request import engine_request
from gateway.errors import EngineUnreachable, GatewayError
from gateway.plant import Plant
from gateway.prefill_leg import PrefillLeg, prefill_leg
from gateway.record import Record
from gateway.recovery import Recovery
from gateway.reply import Renamer, renamer
from gateway.routing import Lease

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_log = logging.getLogger(__name__)


class Asker(Listener, Protocol):
    """Whose call it is: hears what the engine says, or why nobody is asked."""

    def broke(self, error: GatewayError) -> None:
        """The engine cannot be reached: another may be asked."""

    def end(self, reason: GatewayError) -> None:
        """It cannot be asked at all."""


class Upstream:
    """Of one call. `lease` is its place, `connection` the one that an answer is expected from."""

    __slots__ = (
        *("_asker", "_call", "_plant", "_record", "_task"),
        *("connection", "is_paused", "lease", "recovery", "span"),
    )

    def __init__(self, plant: Plant, call: Call, record: Record, asker: Asker) -> None:
        self.lease: Lease | None = None
        self.connection: EngineConnection | None = None
        self.is_paused = False  # the client does not keep up
        self.recovery: Recovery | None = None  # nothing has gone wrong
        self.span: Span | None = None
        self._plant, self._call, self._record, self._asker = plant, call, record, asker
        self._task: asyncio.Task[None] | None = None

    def recover(self) -> Recovery:
        """What becomes of the call, now that something went wrong."""
        if self.recovery is None:
            self.recovery = Recovery(self._plant, self._call, self._record)
        return self.recovery

    @property
    def tried(self) -> Collection[str]:
        """Endpoints that it should not go to again."""
        return self.recovery.tried if self.recovery is not None else ()

    @property
    def renamer(self) -> Renamer | None:
        """Puts the client's name of the model into what the engine says; None: it stands there."""
        if self.lease is None:
            return None
        endpoint = self.lease.endpoint
        return renamer(endpoint.served_model_name or endpoint.model, self._call.model)

    # To an engine

    def wait(self, pause_s: float = 0.0) -> None:
        """After `pause_s`, ask at the first place that comes free."""
        self._run(partial(self._take_place, pause_s))

    def go(self, lease: Lease) -> None:
        """Ask at the place `lease`."""
        self.lease = lease
        self._plant.meter.at_engine(self._record.model, lease.endpoint.variant, 1)
        self._ask()

    def reconnect(self) -> None:
        """Ask there again, on a new connection."""
        self.connection = None
        self._run(self._connect)

    async def _take_place(self, pause_s: float) -> None:
        admission, model = self._plant.admission, self._record.model
        if pause_s:
            await asyncio.sleep(pause_s)
        lease = admission.try_acquire(model, self.tried, self._call)
        if lease is None:
            since = time.monotonic()
            try:
                with self._plant.meter.queued(model):
                    lease = await admission.wait(model, self.tried, self._call)
            finally:
                self._record.queued_s += time.monotonic() - since
        self._task = None
        self.go(lease)

    def _ask(self, *, after_leg: bool = False) -> None:
        lease, record = self.lease, self._record
        if lease is None:
            return
        endpoint = lease.endpoint
        record.variant, record.endpoint = endpoint.variant, endpoint.key
        if endpoint.role != "whole" and not after_leg:
            leg = prefill_leg(self._plant, self._call, lease, record, self.span)
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
        if self.lease is None:
            return
        try:
            connection = await self._plant.engines.connect(self.lease.endpoint)
        except EngineUnreachable as error:
            self._task = None
            self._asker.broke(error)
        else:
            self._task = None
            self._send(connection)

    def _send(self, connection: EngineConnection) -> None:
        lease, call = self.lease, self._call
        if lease is None:
            connection.abort()
            return
        if self.recovery is not None:
            lease.rewrite, self.recovery.asked_at = self.recovery.migration, time.monotonic()
        try:
            head, body = engine_request(call, lease)
        except GatewayError as error:
            connection.abort()
            self._asker.end(error)
            return
        self.connection = connection
        if self.is_paused:
            connection.pause()
        connection.ask(head, body, self._asker)

    # At the engine

    def pause(self) -> None:
        """Read no more of what it says, for now."""
        self.is_paused = True
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        """Read on."""
        self.is_paused = False
        if self.connection is not None:
            self.connection.resume()

    # Away from it

    def leave(self) -> None:
        """Wait for nothing, hang up, and give the place to others."""
        self.stop_waiting()
        self.hang_up()
        self.leave_place()

    def close(self) -> None:
        """Leave, for good: the call is over, and is freed at once as nothing here refers to it."""
        self.leave()
        del self._asker

    def stop_waiting(self) -> None:
        """For a place, a prompt that is read elsewhere, or a connection."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def hang_up(self) -> None:
        """Hear no more from the engine."""
        if self.connection is not None:
            self.connection.abort()
            self.connection = None

    def leave_place(self) -> None:
        """Give it to others. Routing learns from what the record tells of the answer."""
        lease, self.lease = self.lease, None
        if lease is not None:
            record = self._record
            self._plant.meter.at_engine(record.model, lease.endpoint.variant, -1)
            self._plant.admission.release(lease, None if record.migrations else record)

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._task = self._plant.loop.create_task(self._guarded(work, self._asker))

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]], asker: Asker) -> None:
        """The edge of a task: what goes wrong in it becomes the client's error."""
        try:
            await work()
        except GatewayError as error:
            self._task = None
            asker.end(error)
        except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
            _log.exception("request %s failed", self._call.request_id)
            self._task = None
            asker.end(GatewayError("internal error; the gateway's log has more"))
