"""A gateway before an engine, and connections to it whose reads are cut exactly as told."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gateway.http_connection import HttpConnection
from gateway.server import Gateway
from tests.gateway.engines import (
    CHAT,
    FakeEngine,
    a_chat,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
    until,
)

BODY = json.dumps(a_chat()).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
START = b"POST %b HTTP/1.1\r\nHost: a\r\n" % CHAT.encode()
PLAIN = START + LENGTH + b"\r\n" + BODY
HIDDEN = b"POST %b HTTP/1.1\r\nHost: a\r\nx-request-id: hidden\r\n" % CHAT.encode()
HIDDEN += LENGTH + b"\r\n" + BODY
LAST = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\nx-request-id: last\r\n\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"
_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
SIZE = b"%x" % len(BODY)


class Pipe(asyncio.Transport):
    """A connection's other end: keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    abort = write_eof = close

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


@dataclass
class Outcome:
    """Statuses in their order, requests that reached the engine, and whether `LAST` was answered."""

    statuses: list[int]
    seen: int
    went_on: bool


@dataclass
class Stand:
    """A gateway before an engine, and connections whose reads are cut exactly as told."""

    gateway: Gateway
    engine: FakeEngine

    async def outcome(self, pieces: Iterable[bytes]) -> Outcome:
        """Feed `pieces` until the connection is closed, which it must be."""
        self.engine.seen.clear()
        pipe, connection = self.connect()
        for piece in pieces:
            if not pipe.closed:
                connection.data_received(piece)
        await until(lambda: pipe.closed)
        connection.connection_lost(None)
        statuses = [int(status) for status in _STATUS.findall(pipe.sent)]
        assert in_flight(self.gateway) == 0
        return Outcome(
            [status for status in statuses if status != 100],
            len(self.engine.seen),
            b"\r\nx-request-id: last\r\n" in pipe.sent,
        )

    def connect(self) -> tuple[Pipe, HttpConnection]:
        assert self.gateway._http is not None
        pipe, connection = Pipe(), HttpConnection(self.gateway._http._shared)
        connection.connection_made(pipe)
        return pipe, connection


@asynccontextmanager
async def a_stand(**limits: int) -> AsyncIterator[Stand]:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine)), limits=limits) as gateway,
    ):
        yield Stand(gateway, engine)


def bytewise(data: bytes) -> list[bytes]:
    return [data[n : n + 1] for n in range(len(data))]
