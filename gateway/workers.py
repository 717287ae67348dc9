"""Several gateway processes behind one port (SO_REUSEPORT), which live and die together."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from gateway.config import GatewayConfig
from gateway.errors import GatewayError
from gateway.ports import hold_port
from gateway.server import serve

_log = logging.getLogger(__name__)
_KILL_AFTER_S = 10.0  # past the drain deadline


def run_workers(config: GatewayConfig) -> None:
    """Start `config.workers` processes and wait for them. A signal stops all; so does one's end.

    Raises:
        StartupFailed: a port is taken.
        GatewayError: a worker ended by itself.
    """
    held = hold_port(config.host, config.http_port)
    ports: dict[str, int | None] = {"http_port": held.getsockname()[1]}
    with held, tempfile.TemporaryDirectory(prefix="bora-gateway-") as metrics_dir:
        if config.grpc_port is None:
            _start_and_watch(config.model_copy(update=ports), metrics_dir)
            return
        with hold_port(config.host, config.grpc_port) as held_too:
            ports["grpc_port"] = held_too.getsockname()[1]
            _start_and_watch(config.model_copy(update=ports), metrics_dir)


def run_worker() -> None:
    """Be one of them: the configuration comes on standard input, whose end means to stop."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        config = GatewayConfig.model_validate_json(stdin.readline())
    uvloop.run(_serve_until_orphaned(config))


async def _serve_until_orphaned(config: GatewayConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_end_of_input() -> None:
        if not os.read(0, 1):
            loop.remove_reader(0)
            stop.set()

    loop.add_reader(0, on_end_of_input)
    await serve(config, stop=stop)


def _start_and_watch(config: GatewayConfig, metrics_dir: str) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": metrics_dir}
    config = config.model_copy(update={"shared_cells_file": Path(metrics_dir) / "limits"})
    command = [sys.executable, "-m", "gateway", "--worker"]
    workers = [
        # Sessions of their own, so that Ctrl-C reaches them once, through us.
        subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
        for _ in range(config.workers)
    ]
    try:
        for worker in workers:
            if worker.stdin:
                worker.stdin.write(config.model_dump_json().encode() + b"\n")
                worker.stdin.flush()
        _watch(workers, config.drain_timeout_s + _KILL_AFTER_S)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            if worker.stdin:
                worker.stdin.close()


def _watch(workers: Sequence[subprocess.Popen[bytes]], patience_s: float) -> None:
    """Until all have ended. Raises `GatewayError` if one did so unasked."""
    stopping_since: float | None = None
    failed: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:
        nonlocal stopping_since
        stopping_since = stopping_since or time.monotonic()
        for worker in workers:
            worker.terminate()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while any(worker.poll() is None for worker in workers):
            ended = [worker for worker in workers if worker.poll() is not None]
            if ended and stopping_since is None:
                stop()
                failed = ended[0]
            if stopping_since and time.monotonic() - stopping_since > patience_s:
                _log.error("workers did not end within %g s: killing them", patience_s)
                return
            time.sleep(0.05)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopping_since is None:
        failed = failed or workers[0]
    if failed:
        raise GatewayError(
            f"a gateway worker ended with code {failed.returncode}; the others were stopped"
        )
