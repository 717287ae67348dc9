"""EngineClient: HTTP to an engine's own OpenAI server, over kept-alive connections."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from dataclasses import dataclass
from functools import lru_cache
from typing import Self
from urllib.parse import urlsplit

from gateway.answer_cache import AnswerCache
from gateway.call import Call
from gateway.endpoints import Endpoint
from gateway.engine_connection import EngineConnection
from gateway.errors import EngineUnreachable

# uvicorn, which vLLM uses, closes idle connections after 5 s; be the first to.
_IDLE_S = 4.0
_SWEEP_S = 1.0
_MAX_KNOWN_ENGINES = 4096
_UNSAFE_IN_HEADER = re.compile(r"[^\x20-\x7e]")


@dataclass(frozen=True, slots=True)
class _Origin:
    host: str
    port: int
    is_tls: bool


class EngineClient:
    """Connections to endpoints. One per event loop, shared by all requests.

    Connections are as many as there are leases: `max_in_flight` bounds both.
    """

    def __init__(self, *, connect_timeout_s: float, max_answer_bytes: int = 1 << 30) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._max_answer_bytes = max_answer_bytes
        self._known: dict[str, AnswerCache] = {}
        self._idle: dict[str, list[EngineConnection]] = {}
        self._tls: ssl.SSLContext | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._sweep()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sweep_timer:
            self._sweep_timer.cancel()
        for connections in self._idle.values():
            for connection in connections:
                connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # so that the event loop closes the sockets

    def take(self, endpoint: Endpoint) -> EngineConnection | None:
        """A connection that is idle, if there is one. It may turn out to be stale."""
        idle = self._idle.get(endpoint.url)
        while idle:
            connection = idle.pop()
            if not connection.closed:
                connection.reused = True
                return connection
        return None

    async def connect(self, endpoint: Endpoint) -> EngineConnection:
        """A new connection.

        Raises:
            EngineUnreachable: nobody answers there.
        """
        loop, url = asyncio.get_running_loop(), endpoint.url
        origin = _origin(url)

        known = self._known.setdefault(url, AnswerCache())

        def free(connection: EngineConnection) -> None:
            connection.idle_since = loop.time()
            self._idle.setdefault(url, []).append(connection)

        try:
            async with asyncio.timeout(self._connect_timeout_s):
                transport, connection = await loop.create_connection(
                    lambda: EngineConnection(
                        endpoint.key, free, known, max_answer_bytes=self._max_answer_bytes
                    ),
                    origin.host,
                    origin.port,
                    ssl=self._tls_context() if origin.is_tls else None,
                )
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"none within {self._connect_timeout_s:g} s"
            raise EngineUnreachable(
                f"no connection to {endpoint.key}: {reason}", retry_after_s=2
            ) from error
        _keep_alive(transport.get_extra_info("socket"))
        return connection

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _sweep(self) -> None:
        """Close what has been idle for long."""
        loop = asyncio.get_running_loop()
        since = loop.time() - _IDLE_S
        for url, connections in list(self._idle.items()):
            live = []
            for connection in connections:
                if connection.idle_since < since:
                    connection.abort()
                elif not connection.closed:
                    live.append(connection)
            if live:
                self._idle[url] = live
            else:
                del self._idle[url]
        if len(self._known) > _MAX_KNOWN_ENGINES:
            self._known.clear()
        self._sweep_timer = loop.call_later(_SWEEP_S, self._sweep)


@lru_cache(maxsize=4096)
def _origin(url: str) -> _Origin:
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    return _Origin(parts.hostname or "", parts.port or (443 if is_tls else 80), is_tls)


def request_head(endpoint: Endpoint, call: Call, path: str, num_body_bytes: int) -> bytes:
    """Of what is asked at `endpoint` for `call`."""
    start = _head(endpoint.url, endpoint.api_key, call.method, path)
    ids = (call.request_id.encode(), num_body_bytes)
    return b"%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (start, call.lines, *ids)


@lru_cache(maxsize=4096)
def _head(url: str, api_key: str | None, method: str, path: str) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        f"host: {urlsplit(url).netloc.rpartition('@')[2]}",
        "content-type: application/json",
        "accept-encoding: identity",
    ]
    if api_key:
        lines.append(f"authorization: Bearer {api_key}")
    return "".join(_UNSAFE_IN_HEADER.sub("?", line) + "\r\n" for line in lines).encode()


def _keep_alive(connected: socket.socket) -> None:
    """Let a connection notice within about 30 s that the engine's host is gone.

    An engine may rightly be silent for minutes, so silence alone must not end a request.
    """
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
