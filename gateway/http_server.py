"""The HTTP/1.1 server: listens, looks after its connections, and ends them."""

from __future__ import annotations

import asyncio
import contextlib

from gateway.config import Limits
from gateway.http_connection import Application, HttpConnection, Shared
from gateway.uploads import Uploads

_SLOWEST_SWEEP_S = 1.0
_SWEEPS_PER_TIMEOUT = 4
_BACKLOG = 4096


class HttpServer:
    """Serves `application` on a port."""

    def __init__(self, application: Application, limits: Limits) -> None:
        uploads = Uploads(max(limits.max_arriving_bytes, limits.max_body_bytes))
        self._shared = Shared(application, limits, asyncio.get_running_loop(), uploads)
        self._server: asyncio.Server | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        shortest_s = min(
            *(limits.header_timeout_s, limits.body_timeout_s),
            *(limits.idle_timeout_s, limits.send_timeout_s),
        )
        self._sweep_s = min(_SLOWEST_SWEEP_S, shortest_s / _SWEEPS_PER_TIMEOUT)

    @property
    def num_connections(self) -> int:
        """Clients that are connected now."""
        return len(self._shared.connections)

    @property
    def num_unsent_bytes(self) -> int:
        """What clients have not taken yet."""
        return sum(connection.num_unsent_bytes for connection in self._shared.connections)

    async def listen(self, host: str, port: int, *, reuse_port: bool) -> int:
        """Take clients; returns the port. Raises `OSError` if it is taken."""
        shared = self._shared
        self._server = await shared.loop.create_server(
            lambda: HttpConnection(shared),
            host,
            port,
            reuse_port=reuse_port or None,
            backlog=_BACKLOG,
        )
        self._sweep()
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    def close_after_answers(self) -> None:
        """Let every connection end with the answer that it waits for."""
        for connection in self._shared.connections:
            connection.close_after()

    async def close(self, grace_s: float) -> None:
        """Take no more clients; end what still runs after `grace_s`."""
        if self._sweep_timer:
            self._sweep_timer.cancel()
        if self._server:
            self._server.close()
        connections = self._shared.connections
        for connection in list(connections):
            connection.close_if_idle()
        self._shared.all_gone.clear()
        if connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._shared.all_gone.wait(), grace_s)
        for connection in list(connections):
            connection.end()
        await asyncio.sleep(0)  # so that the event loop closes the sockets

    def _sweep(self) -> None:
        loop = self._shared.loop
        now = loop.time()
        for connection in list(self._shared.connections):
            connection.check(now)
        self._sweep_timer = loop.call_later(self._sweep_s, self._sweep)
