"""The request path: admit, route, ask the engine, hand its answer back, account for it.

The faces (`http_api`, `grpc_api`) make a Call and are the client of its Exchange; everything between
is there and here, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from gateway.access import Access
from gateway.admission import Admission
from gateway.call import Call
from gateway.engine import EngineClient
from gateway.errors import GatewayError
from gateway.exchange import Exchange
from gateway.metering import Meter
from gateway.plant import Client, Plant, shutting_down
from gateway.pull import Pull
from gateway.record import Record
from gateway.tracing import Tracing

_log = logging.getLogger(__name__)
_WATCH_S = 1.0
_LAST_WORDS_S = 3.0  # after the drain deadline, for errors to get out


class Forwarder:
    """Carries calls to engines. Its state is who is under way."""

    def __init__(
        self,
        admission: Admission,
        engines: EngineClient,
        meter: Meter,
        tracing: Tracing,
        access: Access,
    ) -> None:
        self.admission = admission
        self.meter = meter
        self.access = access
        loop = asyncio.get_running_loop()
        self._plant = Plant(admission, engines, meter, tracing, access, loop)
        self._watch: asyncio.TimerHandle | None = None

    @property
    def draining(self) -> bool:
        """No more calls are taken."""
        return self._plant.draining

    def exchange(self, call: Call, client: Client) -> Exchange:
        """What answers `call`, pushing to `client`, once it is told to begin."""
        return Exchange(self._plant, call, client)

    def forward(self, call: Call) -> Pull:
        """`async with` it for the answer to `call`."""
        return Pull(self._plant, call)

    def endpoint_died(self, key: str) -> None:
        """The engine there answers no more: what runs there goes on elsewhere."""
        for exchange in list(self._plant.running):
            if exchange.is_at(key):
                exchange.give_up("it does not answer its health checks")

    def watch(self) -> None:
        """From now on look for engines that fall silent, and tell the metrics, until `close`."""
        now = time.monotonic()
        for exchange in list(self._plant.running):
            exchange.check(now)
        self.meter.flush()
        self._watch = self._plant.loop.call_later(_WATCH_S, self.watch)

    def close(self) -> None:
        """Look no more."""
        if self._watch is not None:
            self._watch.cancel()
        self.meter.flush()

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls; let those that run finish, but end them after `timeout_s`."""
        plant = self._plant
        plant.draining = True
        if not plant.running:
            return
        _log.info("draining: %d requests run", len(plant.running))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(plant.idle.wait(), timeout_s)
        for exchange in list(plant.running):
            exchange.end(shutting_down())
        if plant.running:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(plant.idle.wait(), _LAST_WORDS_S)

    def rejected(self, record: Record, error: GatewayError) -> None:
        """Account for a request that was refused before it became a call."""
        record.status, record.error = error.status, error.message
        record.refusal = error.code or ""
        self.meter.finished(record)
