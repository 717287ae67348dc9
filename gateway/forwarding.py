"""The request path: admit, route, ask the engine, hand its answer back, account for it.

The faces (`http_api`, `grpc_api`) make a Call and write a Reply; everything between is here and in
`exchange`, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from gateway.access import Access
from gateway.admission import Admission
from gateway.call import Call
from gateway.engine import EngineClient
from gateway.errors import GatewayError
from gateway.exchange import Exchange, Plant, shutting_down
from gateway.metering import Meter
from gateway.record import Record
from gateway.tracing import Tracing

_log = logging.getLogger(__name__)
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

    @property
    def draining(self) -> bool:
        """No more calls are taken."""
        return self._plant.draining

    def forward(self, call: Call) -> Exchange:
        """`async with` it for the reply to `call`."""
        return Exchange(self._plant, call)

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls; let those that run finish, but end them after `timeout_s`."""
        plant = self._plant
        plant.draining = True
        if not plant.running:
            return
        _log.info("draining: %d requests run", len(plant.running))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(plant.idle.wait(), timeout_s)
        for exchange in plant.running:
            exchange.end(shutting_down())
        if plant.running:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(plant.idle.wait(), _LAST_WORDS_S)

    def rejected(self, record: Record, error: GatewayError) -> None:
        """Account for a request that was refused before it became a call."""
        record.status, record.error = error.status, error.message
        record.refusal = error.code or ""
        self.meter.finished(record)
