"""EngineClient: HTTP to an engine's own OpenAI server, over kept-alive connections."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, Self

import aiohttp

from gateway.endpoints import Endpoint
from gateway.errors import EngineBroke, EngineUnreachable

# uvicorn, which vLLM uses, closes idle connections after 5 s; be the first to.
_IDLE_S = 4.0
_BROKEN = (aiohttp.ClientError, OSError, TimeoutError)


class Answer:
    """An engine's answer, from its status line on."""

    def __init__(self, response: aiohttp.ClientResponse, endpoint: Endpoint) -> None:
        self.status = response.status
        self.headers = response.headers
        self._response = response
        self._endpoint = endpoint

    async def next(self) -> bytes:
        """The next bytes as they came, empty at the end.

        Raises:
            EngineBroke: the connection broke before the end.
        """
        try:
            return await self._response.content.readany()
        except _BROKEN as error:
            raise _broke(self._endpoint, error) from error

    async def read(self) -> bytes:
        """All of the body. Raises as `next` does."""
        try:
            return await self._response.read()
        except _BROKEN as error:
            raise _broke(self._endpoint, error) from error

    def close(self) -> None:
        """Hang up unless everything was read: the engine stops working on it."""
        self._response.close()


class EngineClient:
    """Sends requests to endpoints. One per event loop, shared by all requests."""

    def __init__(self, *, connect_timeout_s: float) -> None:
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._pooled = self._session(force_close=False)
        self._fresh = self._session(force_close=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pooled.close()
        await self._fresh.close()

    async def post(
        self, endpoint: Endpoint, path: str, body: bytes, headers: dict[str, str]
    ) -> Answer:
        """Send, and wait for the answer's headers.

        Raises:
            EngineUnreachable: no connection; nothing was sent.
            EngineBroke: the connection broke before the answer began.
        """
        headers = {**headers, "content-type": "application/json", "accept-encoding": "identity"}
        if endpoint.api_key:
            headers["authorization"] = f"Bearer {endpoint.api_key}"
        connection = SimpleNamespace(reused=False)
        request = {"data": body, "headers": headers, "trace_request_ctx": connection}
        try:
            try:
                return await self._send(self._pooled, endpoint, path, **request)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not connection.reused:
                    raise
            # The engine closed an idle connection while we took it for alive: that is no failure.
            return await self._send(self._fresh, endpoint, path, **request)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise EngineUnreachable(
                f"no connection to {endpoint.key}: {_reason(error)}", retry_after_s=2
            ) from error
        except _BROKEN as error:
            raise _broke(endpoint, error) from error

    async def _send(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, path: str, **request: Any
    ) -> Answer:
        response = await session.post(endpoint.url + path, allow_redirects=False, **request)
        return Answer(response, endpoint)

    def _session(self, *, force_close: bool) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        connector = aiohttp.TCPConnector(
            limit=0,
            force_close=force_close,
            keepalive_timeout=None if force_close else _IDLE_S,
            socket_factory=_socket_with_keepalive,
        )
        return aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        )


async def _note_reuse(_session: aiohttp.ClientSession, context: Any, _params: Any) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.reused = True


def _socket_with_keepalive(address: Any) -> socket.socket:
    """A socket that notices within about 30 s that the engine's host is gone.

    An engine may rightly be silent for minutes, so silence alone must not end a request.
    """
    family, kind, protocol, _, _ = address
    result = socket.socket(family=family, type=kind, proto=protocol)
    result.setblocking(False)
    result.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux
        result.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        result.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        result.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return result


def _broke(endpoint: Endpoint, error: BaseException) -> EngineBroke:
    return EngineBroke(f"the engine at {endpoint.key} broke off: {_reason(error)}")


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
