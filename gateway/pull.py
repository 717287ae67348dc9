"""Pull: an exchange for a caller that awaits its answer piece by piece, as gRPC does."""

from __future__ import annotations

import asyncio
from typing import Self

from gateway.call import Call
from gateway.errors import GatewayError
from gateway.exchange import Exchange
from gateway.plant import Plant
from gateway.reply import headers_of

_HIGH_WATER_BYTES = 256 * 1024


class Pull:
    """`async with` it: inside of the block the answer has begun.

    All of it is in `body`, or it comes with `next`. At the end of the block the engine is hung up
    on, unless it is done.

    Raises:
        GatewayError: there is no answer, or (from `next`) none any more.
    """

    def __init__(self, plant: Plant, call: Call) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body: bytes | None = None
        self._exchange = Exchange(plant, call, self)
        self._loop = plant.loop
        self._parts: list[bytes] = []
        self._num_buffered = 0
        self._complete = False
        self._error: GatewayError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            self._exchange.begin()
            while not self.status:
                if self._error is not None:
                    raise self._error
                await self._more()
        except (asyncio.CancelledError, GatewayError):
            self._leave()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._exchange.client_left()
        del self._exchange  # it refers to this: so both are freed at once

    async def next(self) -> bytes:
        """The next bytes, whole events if it is an event stream; empty at the end."""
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._complete:
                return b""
            await self._more()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        if self._num_buffered > _HIGH_WATER_BYTES:
            self._exchange.resume()
        self._num_buffered = 0
        return data

    # What the exchange does

    write_chunks = None  # bytes without HTTP's chunks are wanted

    def whole(self, status: int, headers: bytes, body: bytes) -> None:
        """See `gateway.plant.Client`, as for what follows."""
        self.status, self.headers, self.body = status, headers_of(headers), body
        self._complete = True
        self._wake()

    def start(self, status: int, headers: bytes, *, is_event_stream: bool) -> None:  # noqa: ARG002, D102
        self.status, self.headers = status, headers_of(headers)
        self._wake()

    def write(self, data: bytes) -> None:  # noqa: D102
        self._parts.append(data)
        before = self._num_buffered
        self._num_buffered += len(data)
        if before <= _HIGH_WATER_BYTES < self._num_buffered:
            self._exchange.pause()
        self._wake()

    def finish(self) -> None:  # noqa: D102
        self._complete = True
        self._wake()

    def fail(self, error: GatewayError) -> None:  # noqa: D102
        self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _more(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter
