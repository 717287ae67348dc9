"""Scrape: `/metrics`, made beside the event loop: with thousands of series it takes half a second."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gateway.errors import GatewayError
from gateway.metering import Meter

_log = logging.getLogger(__name__)


class Scrape:
    """Answers one client with the metrics, or an error. `turn` bounds how many are made at a time."""

    def __init__(
        self, meter: Meter, turn: asyncio.Lock, respond: Callable[[bytes | GatewayError], None]
    ) -> None:
        self._meter = meter
        self._turn = turn
        self._respond = respond
        self._task = asyncio.ensure_future(self._answer())

    async def _answer(self) -> None:
        told: bytes | GatewayError
        try:
            async with self._turn:
                self._meter.flush()
                told = await asyncio.to_thread(self._meter.exposition)
        except Exception:  # noqa: BLE001 - a bug must not leave the client without an answer
            _log.exception("the metrics cannot be told")
            told = GatewayError("internal error; the gateway's log has more")
        self._respond(told)

    def pause(self) -> None:
        """Nothing is sent before all of it is there."""

    def resume(self) -> None:
        """As `pause`."""

    def client_left(self) -> None:
        """Nobody waits any more."""
        self._task.cancel()
