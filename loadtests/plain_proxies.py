"""Proxies without any feature, to compare with: what the loop and the parser alone cost.

    python -m loadtests.plain_proxies floor --port 18400 --engine-port 18301

`floor`: asyncio.Protocol on uvloop with llhttp on both sides. `aiohttp`: its server and client.
"""

from __future__ import annotations

import argparse
import asyncio

import aiohttp
import httptools
import uvloop
from aiohttp import web


class _Upstream(asyncio.Protocol):
    """A connection to the engine, which writes to whichever client asked last."""

    def __init__(self, pool: list[_Upstream]) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self.client: asyncio.Transport
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        self.client.write(data)

    def on_message_complete(self) -> None:
        self._pool.append(self)


class _Downstream(asyncio.Protocol):
    """A client's connection."""

    def __init__(self, engine_port: int, pool: list[_Upstream]) -> None:
        self._engine_port = engine_port
        self._pool = pool
        self._parser = httptools.HttpRequestParser(self)
        self._received = b""
        self._transport: asyncio.Transport
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        request, self._received = self._received, b""
        if self._pool:
            self._send(self._pool.pop(), request)
            return
        task = asyncio.create_task(self._connect(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(
            lambda: _Upstream(self._pool), "127.0.0.1", self._engine_port
        )
        self._send(upstream, request)

    def _send(self, upstream: _Upstream, request: bytes) -> None:
        upstream.client = self._transport
        upstream.transport.write(request)


async def _floor(port: int, engine_port: int) -> None:
    pool: list[_Upstream] = []
    server = await asyncio.get_running_loop().create_server(
        lambda: _Downstream(engine_port, pool), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


async def _aiohttp(port: int, engine_port: int) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

        async def forward(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            url = f"http://127.0.0.1:{engine_port}{request.path}"
            headers = {"content-type": "application/json"}
            async with session.post(url, data=body, headers=headers) as answer:
                kept = {"content-type": answer.headers["content-type"]}
                response = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response

        app = web.Application()
        app.router.add_post("/{path:.*}", forward)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["floor", "aiohttp"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine-port", type=int, required=True)
    options = parser.parse_args()
    serve = _floor if options.which == "floor" else _aiohttp
    uvloop.run(serve(options.port, options.engine_port))


if __name__ == "__main__":
    main()
