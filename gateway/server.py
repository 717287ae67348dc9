"""A gateway from start to end: listen, follow the endpoint table, drain, stop.

`run` is what `bora gateway` calls, `serve` is one process on a running event loop, and `Gateway` is
the thing itself, for programs and tests that start and stop it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal, Self

import uvloop
from pydantic import ValidationError

from gateway.access import Access
from gateway.access_log import AccessLog
from gateway.accounts import Accounts
from gateway.adapters import with_adapters
from gateway.admission import Admission
from gateway.config import GatewayConfig, Limits
from gateway.endpoints import EndpointTable
from gateway.engine import EngineClient
from gateway.errors import StartupFailed
from gateway.forwarding import Forwarder
from gateway.grpc_server import GrpcServer
from gateway.health import HealthChecker
from gateway.http_api import HttpApi
from gateway.http_server import HttpServer
from gateway.kept_answer import KeptAnswer
from gateway.key_feed import KeyFeed
from gateway.metering import Meter
from gateway.ports import cannot_listen, require_free_port
from gateway.shared_cells import SharedCells
from gateway.table_feed import ControllerFeed, FileFeed
from gateway.tracing import tracing_from
from placement.errors import ConfigError

_log = logging.getLogger(__name__)
_GARBAGE_THRESHOLDS = (20_000, 20, 50)
_LAST_ANSWERS_S = 1.0  # when everything ends, for what is being sent


class Gateway:
    """One gateway process. `async with Gateway(config) as gateway` listens inside of the block.

    Raises:
        StartupFailed: on entering: a port is taken, or the endpoints file is wrong.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.admission = Admission(config.limits, workers=config.workers, seed=os.getpid())
        self._shared = SharedCells(config.shared_cells_file) if config.shared_cells_file else None
        self.access = Access(required=config.auth == "keys", accounts=Accounts(shared=self._shared))
        self._access_log = AccessLog(config.access_log_sample) if config.access_log else None
        self.meter = Meter(self._access_log)
        self.admission.router.on_change = self.meter.endpoint_changed
        self.http_port = config.http_port
        self.grpc_port = config.grpc_port
        self._forwarder: Forwarder | None = None
        self._http: HttpServer | None = None
        self._grpc: GrpcServer | None = None
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_ready(self) -> bool:
        """It has a table and takes requests."""
        draining = self._forwarder is None or self._forwarder.draining
        return self.admission.table is not None and self.access.is_ready and not draining

    @property
    def num_connections(self) -> int:
        """HTTP clients that are connected."""
        return self._http.num_connections if self._http else 0

    @property
    def num_unsent_bytes(self) -> int:
        """What HTTP clients have not taken yet."""
        return self._http.num_unsent_bytes if self._http else 0

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def apply(self, table: EndpointTable, changed_s: float = 0.0) -> None:
        """Route by `table` from now on.

        `changed_s`: epoch seconds of the first change that was not routed by yet; 0: not known.
        """
        table = with_adapters(table)
        self.admission.apply(table)
        router = self.admission.router
        ready = {model.name: router.num_ready(model.name) for model in router.models}
        self.meter.table_applied(table.version, ready.items())
        self.meter.endpoints_listed(table.endpoints)
        if changed_s:
            self.meter.table_delayed(time.time() - changed_s)
        _log.info("endpoint table %d: %s", table.version, ready)
        self._tell_health()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; let those that run finish, but end them after `timeout_s`."""
        if self._forwarder is None:
            return
        draining = asyncio.create_task(self._forwarder.drain(timeout_s))
        await asyncio.sleep(0)  # it now refuses requests
        if self._http:
            self._http.close_after_answers()
        self._tell_health()
        await draining

    async def _start(self) -> None:
        config = self.config
        limits = config.limits
        if self._access_log:
            self._stack.callback(self._access_log.flush)
        tracing = tracing_from(os.environ)
        self._stack.push_async_callback(asyncio.to_thread, tracing.close)
        engines = EngineClient(
            connect_timeout_s=limits.connect_timeout_s, max_answer_bytes=limits.max_answer_bytes
        )
        await self._stack.enter_async_context(engines)
        if self._shared:
            self._stack.callback(self._shared.close)
        if config.keys_file:
            await self._follow_keys(config.keys_file)
        self._forwarder = Forwarder(self.admission, engines, self.meter, tracing, self.access)
        self._forwarder.watch()
        self._stack.callback(self._forwarder.close)
        feed = self._feed()
        if isinstance(feed, FileFeed):
            try:
                self.apply(feed.load())
            except ConfigError as error:
                raise StartupFailed(str(error)) from error
        else:
            self._stack.push_async_callback(feed.tell_last)
        await self._check_engines(self._forwarder)
        await self._listen_http(self._forwarder)
        if config.grpc_port is not None:
            await self._listen_grpc(self._forwarder, config.grpc_port)
        follower = asyncio.create_task(feed.follow(self.apply))
        self._stack.push_async_callback(_cancel, follower)
        _log.info(
            "gateway listens on %s: HTTP %d, gRPC %s", config.host, self.http_port, self.grpc_port
        )

    async def _check_engines(self, forwarder: Forwarder) -> None:
        limits = self.config.limits
        if limits.health_interval_s:
            checker = HealthChecker(
                self.admission.router,
                limits,
                on_dead=forwarder.endpoint_died,
                on_revived=self.admission.recheck,
            )
            await checker.look_around()
            self._stack.push_async_callback(_cancel, asyncio.create_task(checker.run()))

    async def _follow_keys(self, path: Path) -> None:
        keys = KeyFeed(path, self.access, poll_s=self.config.poll_s)
        keys.start()
        self._stack.push_async_callback(asyncio.to_thread, keys.flush)
        self._stack.push_async_callback(_cancel, asyncio.create_task(keys.follow()))

    def _feed(self) -> FileFeed | ControllerFeed:
        config = self.config
        if config.endpoints_file:
            return FileFeed(config.endpoints_file, poll_s=config.poll_s)
        return ControllerFeed(
            config.controller_url or "",
            config.controller_token,
            gateway_id=f"{socket.gethostname()}-{os.getpid()}-{id(self):x}",
            loads=self.admission.loads,
            access=self.access,
            kept=KeptAnswer(config.kept_file) if config.kept_file else None,
        )

    async def _listen_http(self, forwarder: Forwarder) -> None:
        config = self.config
        api = HttpApi(forwarder, is_ready=lambda: self.is_ready, workers=config.workers)
        self._http = HttpServer(api, config.limits)
        self._stack.push_async_callback(self._http.close, _LAST_ANSWERS_S)
        try:
            self.http_port = await self._http.listen(
                config.host, config.http_port, reuse_port=config.workers > 1
            )
        except OSError as error:
            raise cannot_listen(config.host, config.http_port, error) from error

    async def _listen_grpc(self, forwarder: Forwarder, port: int) -> None:
        config = self.config
        if config.workers == 1:
            require_free_port(config.host, port)  # gRPC itself says it less clearly
        self._grpc = GrpcServer(forwarder, reuse_port=config.workers > 1)
        try:
            self.grpc_port = await self._grpc.start(config.host, port)
        except RuntimeError as error:
            raise cannot_listen(config.host, port, error) from error
        self._stack.push_async_callback(self._grpc.stop, 1.0)
        self._tell_health()

    def _tell_health(self) -> None:
        if self._grpc:
            task = asyncio.ensure_future(self._grpc.set_ready(ready=self.is_ready))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def serve(config: GatewayConfig, *, stop: asyncio.Event | None = None) -> None:
    """Run one gateway until SIGTERM, SIGINT or `stop`, then drain. A second signal ends it at once.

    Raises:
        StartupFailed: a port is taken, or the endpoints file is wrong.
    """
    _take_resources()
    stop, hurry = stop or asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        async with Gateway(config) as gateway:
            await stop.wait()
            draining = asyncio.create_task(gateway.drain(config.drain_timeout_s))
            hurried = asyncio.create_task(hurry.wait())
            await asyncio.wait((draining, hurried), return_when=asyncio.FIRST_COMPLETED)
            await _cancel(draining)
            await _cancel(hurried)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def run(
    *,
    endpoints: Path | None = None,
    controller: str | None = None,
    token_file: Path | None = None,
    kept_file: Path | None = None,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int | None = 8001,
    workers: int = 1,
    drain_timeout_s: float = 30.0,
    access_log: bool = True,
    limits: Limits | None = None,
    keys: Path | None = None,
    auth: Literal["none", "keys"] = "none",
) -> None:
    """Run a gateway until SIGTERM or SIGINT, with logs on standard error. Blocks.

    The endpoint table comes from the file `endpoints`, or from `controller` (a URL; `token_file`
    holds its bearer token, `kept_file` what it told last, for a start while it is away).
    `grpc_port=None` leaves gRPC out. With the key file `keys`, or `auth: keys` and a controller,
    clients need API keys.

    Raises:
        GatewayError: it cannot start, or a worker died. `exit_code` is what a process should end with.
    """
    try:
        config = GatewayConfig(
            endpoints_file=endpoints,
            controller_url=controller,
            controller_token=_token(token_file),
            kept_file=kept_file,
            auth="keys" if keys else auth,
            keys_file=keys,
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            workers=workers,
            drain_timeout_s=drain_timeout_s,
            access_log=access_log,
            limits=limits or Limits(),
        )
    except ValidationError as error:
        raise StartupFailed(_told_simply(error)) from None
    log_to_stderr()
    if workers > 1:
        from gateway.workers import run_workers  # noqa: PLC0415 - it imports this module

        run_workers(config)
    else:
        uvloop.run(serve(config))


def log_to_stderr() -> None:
    """The process's logging: text lines, and the access log as bare JSON lines."""
    text = logging.StreamHandler()
    text.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[text])
    access = logging.getLogger("gateway.access")
    access.handlers = [logging.StreamHandler()]
    access.propagate = False


def _take_resources() -> None:
    """Two files a stream; and garbage is collected rarely, as requests' objects form few cycles."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE_THRESHOLDS)


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupFailed(f"the token file {path} cannot be read: {error}") from error


def _told_simply(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)


async def _cancel(task: asyncio.Task[object]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
