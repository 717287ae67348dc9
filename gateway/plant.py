"""Plant: what all exchanges share, and whom they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from gateway.access import Access
from gateway.admission import Admission
from gateway.engine import EngineClient
from gateway.errors import GatewayError, Unavailable
from gateway.metering import Meter
from gateway.tracing import Tracing


class Client(Protocol):
    """Who asked. Gets either a `whole` answer, or `start`, `write` ... and `finish`.

    `fail` may come at any time, and ends it.
    """

    @property
    def write(self) -> Callable[[bytes], None]:
        """Takes a part of a body, not empty."""

    @property
    def write_chunks(self) -> Callable[[bytes], None] | None:
        """After `start`, for parts with HTTP's chunks around them; None where nobody reads those."""

    def whole(self, status: int, headers: bytes, body: bytes) -> None:
        """All of an answer. `headers` are lines that each end in CRLF."""

    def start(self, status: int, headers: bytes, *, is_event_stream: bool) -> None:
        """The head of an answer whose body comes with `write`, up to `finish`."""

    def finish(self) -> None:
        """The body is complete."""

    def fail(self, error: GatewayError) -> None:
        """There is no answer, or no more of it."""


class Running(Protocol):
    """An exchange under way, as the gateway sees it."""

    def end(self, reason: GatewayError) -> None:
        """Stop it now, with `reason` as the client's error."""

    def check(self, now: float) -> None:
        """Called every second: see whether its engine still speaks."""

    def give_up(self, reason: str) -> None:
        """Leave the engine that this is at, and go on elsewhere."""

    def is_at(self, endpoint_key: str) -> bool:
        """Whether it has a place at that endpoint."""


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
    running: set[Running] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def left(self, exchange: Running) -> None:
        """`exchange` is over."""
        self.running.discard(exchange)
        if self.draining and not self.running:
            self.idle.set()


def shutting_down() -> Unavailable:
    """What clients hear from a gateway that is about to end."""
    return Unavailable("the gateway is shutting down", retry_after_s=1)
