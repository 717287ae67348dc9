"""Answer: what comes back from an engine, read by pulling (`next`) or pushed to a function (`pour`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from gateway.errors import EngineBroke

_HIGH_WATER_BYTES = 256 * 1024  # read ahead of a reader that pulls


class Connection(Protocol):
    """Where an answer comes from."""

    def pause(self) -> None:
        """Read no more for now."""

    def resume(self) -> None:
        """Read again."""

    def abort(self) -> None:
        """Hang up."""


class Answer:
    """An engine's answer. It has begun when its head and first bytes, or all of a JSON body, are here.

    Header names are lower-case.
    """

    __slots__ = (
        *("_connection", "_num_buffered", "_parts", "_sink", "_waiter", "complete", "error"),
        *("content_type", "headers", "is_json", "status"),
    )

    def __init__(self, connection: Connection, begun: asyncio.Future[None]) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.content_type = b""
        self.is_json = False
        self.complete = False
        self.error: EngineBroke | None = None
        self._sink: Callable[[bytes], None] | None = None
        self._num_buffered = 0
        self._connection = connection
        self._waiter: asyncio.Future[None] | None = begun
        self._parts: list[bytes] = []

    @property
    def is_empty(self) -> bool:
        """It ended, and there is nothing to take."""
        return self.complete and not self._parts

    @property
    def _is_open(self) -> bool:
        return not self.complete and self.error is None

    async def next(self) -> bytes:
        """The next bytes, empty at the end.

        Raises:
            EngineBroke: the connection broke before the end.
        """
        while not self._parts:
            if self.error is not None:
                raise self.error
            if self.complete:
                return b""
            await self._more()
        return self._take()

    async def pour(self, sink: Callable[[bytes], None]) -> None:
        """Give all bytes to `sink`, as they come, until the end. Raises as `next`."""
        if self._parts:
            sink(self._take())
        self._sink = sink
        while not self.complete:
            if self.error is not None:
                raise self.error
            await self._more()

    def read(self) -> bytes:
        """All that has come and was not taken yet."""
        return self._take() if self._parts else b""

    def pause(self) -> None:
        """Leave further bytes with the engine."""
        if self._is_open:
            self._connection.pause()

    def resume(self) -> None:
        """Read again."""
        if self._is_open:
            self._connection.resume()

    def close(self) -> None:
        """Hang up unless everything was read: the engine stops working on it."""
        self._sink = None
        if self._is_open:
            self._connection.abort()

    # What the connection does

    def received(self, data: bytes) -> None:
        """Bytes of the body."""
        if self._sink is not None:
            self._sink(data)
            return
        self._parts.append(data)
        if self.is_json:
            return
        self._num_buffered += len(data)
        if self._num_buffered > _HIGH_WATER_BYTES:
            self.pause()
        self._wake()

    def ended(self, error: EngineBroke | None = None) -> None:
        """Nothing more will come."""
        self.complete, self.error = error is None, error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def _more(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _take(self) -> bytes:
        parts = self._parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._num_buffered > _HIGH_WATER_BYTES:
            self.resume()
        self._num_buffered = 0
        return data
