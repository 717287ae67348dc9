"""How the simulated engine fails on purpose: only when it was started with `--drill`.

POST /drill {"kind": "silence", "after_tokens": 5}    from now on, until the next POST
GET /drill                                            what is on, who came, and when clients left
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import time
from collections import deque
from typing import Literal, Self

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.engines.sim_api import RequestRefused, error_body

PATH = "/drill"

_GARBAGE = b"\x16\x03\x01\x02\x00\x01garbage \xff\xfe\x00 HTTP/9.9 banana\r\n\r\n\r\n"
_GARBAGE_EVENT = b'data: {"id":"chatcmpl-\xff\x00","choices":[{"index":0,"del\n\n'
_MAX_REMEMBERED = 100_000


class Fault(BaseModel):
    """One way to fail, for every request from when it is set.

    Without `after_tokens` it strikes before the answer's head, with 0 after the head, with more
    after so many tokens of an answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal[
        "none",  # serves
        "slow",  # every step takes `slowdown` times as long
        "silence",  # keeps the connection and says nothing more
        "reset",  # resets the connection (TCP RST)
        "garbage",  # bytes that are not HTTP, then the end of the connection
        "garbage-event",  # in place of a token's event one that is not JSON; the stream goes on
        "status",  # HTTP `status` and an error body
        "kill",  # the process ends itself with SIGKILL
    ] = "none"
    after_tokens: int | None = Field(None, ge=0)
    slowdown: float = Field(1.0, gt=0)
    status: int = Field(500, ge=400, le=599)
    everywhere: bool = Field(
        default=False, description="Not only answers: /health, /metrics and all others fail too."
    )

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.kind == "garbage-event" and not self.after_tokens:
            raise ValueError("garbage-event needs after_tokens, 1 or more")
        if self.kind == "status" and self.after_tokens is not None:
            raise ValueError("a status goes before the answer: leave after_tokens out")
        return self


class Drill:
    """The fault that is on, and who came and when clients left, for who measures cancellation."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self._arrivals: deque[str] = deque(maxlen=_MAX_REMEMBERED)
        self._departures: deque[tuple[str, float]] = deque(maxlen=_MAX_REMEMBERED)

    @property
    def slowdown(self) -> float:
        """What a step's time is multiplied with."""
        return self.fault.slowdown if self.fault.kind == "slow" else 1.0

    def arrived(self, request_id: str) -> None:
        """The engine has that request."""
        self._arrivals.append(request_id)

    def departed(self, request_id: str) -> None:
        """The client of that request has hung up before its answer was whole."""
        self._departures.append((request_id, time.time()))

    async def get(self, _: web.Request) -> web.Response:
        """GET /drill."""
        departures = [{"request_id": name, "at_s": at_s} for name, at_s in self._departures]
        return web.json_response(
            {
                "fault": self.fault.model_dump(),
                "arrivals": list(self._arrivals),
                "departures": departures,
            }
        )

    async def post(self, request: web.Request) -> web.Response:
        """POST /drill."""
        try:
            self.fault = Fault.model_validate_json(await request.read())
        except ValidationError as error:
            raise RequestRefused(f"not a fault: {error.errors()[0]['msg']}") from None
        self._arrivals.clear()
        self._departures.clear()
        return web.json_response(self.fault.model_dump())

    async def before_head(self, request: web.Request, *, generates: bool) -> None:
        """Fail now, if it is time.

        Raises:
            RequestRefused: by a fault of kind `status`.
        """
        fault = self.fault
        if fault.after_tokens is None and (generates or fault.everywhere):
            if fault.kind == "status":
                refused = RequestRefused("simulated failure", status=fault.status)
                refused.body = error_body("simulated failure", fault.status)
                raise refused
            await _strike(fault, request)

    def instead(self, num_tokens: int) -> bytes | None:
        """What stands in place of the event of an answer's token of that number, if anything."""
        fault = self.fault
        is_now = fault.kind == "garbage-event" and fault.after_tokens == num_tokens
        return _GARBAGE_EVENT if is_now else None

    async def after(self, num_tokens: int, request: web.Request) -> None:
        """Fail now, if it is time."""
        if self.fault.after_tokens == num_tokens:
            await _strike(self.fault, request)


async def _strike(fault: Fault, request: web.Request) -> None:
    if fault.kind not in ("silence", "reset", "garbage", "kill"):
        return
    transport = request.transport
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if transport is not None and fault.kind == "garbage":
        transport.write(_GARBAGE)
        transport.close()
    if transport is not None and fault.kind == "reset":
        # Closing with unsent data thrown away is what makes the kernel send RST.
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    await asyncio.Event().wait()  # until the client hangs up, which cancels the handler
