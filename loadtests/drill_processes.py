"""Processes that a drill starts, kills, freezes and starts again, and what they use."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from gateway import ports
from loadtests.processes import CannotRun, last_line

_PORTS = range(30_000, 32_768)


def free_ports(count: int) -> list[int]:
    """As `gateway.ports.free_ports`, of which bora itself takes none while it starts here."""
    return ports.free_ports(count, among=_PORTS)


@dataclass(slots=True)
class Process:
    """One process that listens on `port`. Its output goes to `log`, which grows over restarts."""

    command: Sequence[str]
    port: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"
    grpc_port: int | None = None
    _popen: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the process that runs.

        Raises:
            CannotRun: none does.
        """
        if self._popen is None or self._popen.poll() is not None:
            raise CannotRun(f"not running: {' '.join(self.command[:4])}; {last_line(self.log)}")
        return self._popen.pid

    async def start(self, timeout_s: float = 90.0) -> None:
        """Start it and wait until it is ready.

        Raises:
            CannotRun: it ended, or was not ready in time.
        """
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(  # noqa: ASYNC220 - it is started, not waited for
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
                while not await self._is_ready(session):
                    _ = self.pid
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise CannotRun(f"not ready within {timeout_s:g} s: {last_line(self.log)}") from None

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}{self.ready_path}") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    def kill(self) -> None:
        """SIGKILL to it and to all that it started; its memory and sockets are gone at return."""
        if self._popen is not None and self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()

    def freeze(self) -> None:
        """SIGSTOP: connections stay and new ones are accepted by the kernel, but nothing answers."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.killpg(self.pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """User and system time of it and its children, seconds."""
        total = 0.0
        for one in self._family():
            times = one.cpu_times()
            total += times.user + times.system
        return total

    def rss_bytes(self) -> int:
        """Resident memory of it and its children."""
        return sum(one.memory_info().rss for one in self._family())

    def num_sockets(self) -> int:
        """Open sockets of it and its children, listening ones included."""
        count = 0
        for one in self._family():
            for file in Path(f"/proc/{one.pid}/fd").iterdir():
                try:
                    count += file.readlink().name.startswith("socket:")
                except OSError:
                    continue  # closed since it was listed
        return count

    def _family(self) -> list[psutil.Process]:
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]


def gateway(
    folder: Path,
    engines: Mapping[int, int],
    *options: str,
    model: str = "chat",
    grpc: bool = False,
    environment: Mapping[str, str] | None = None,
    roles: Mapping[int, str] | None = None,
) -> Process:
    """Bora's gateway before `engines` (port -> requests it takes at once), not started yet.

    `roles`: port -> `prefill` or `decode`, of engines that do one part of a request's work.
    """
    http_port, grpc_port = free_ports(2)
    lines = [
        f'  - {{model: {model}, url: "http://127.0.0.1:{port}", max_in_flight: {limit},'
        f" role: {(roles or {}).get(port, 'whole')}}}\n"
        for port, limit in engines.items()
    ]
    endpoints = folder / f"endpoints-{http_port}.yaml"
    endpoints.write_text(
        # Managed: somebody starts lost engines again, so a request that lost its own may wait.
        f"models:\n  - {{name: {model}, managed: true}}\nendpoints:\n{''.join(lines)}"
    )
    listen = ["--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    if not grpc:
        listen = [*listen[:2], "--no-grpc"]
    command = [sys.executable, "-m", "gateway", "--endpoints", str(endpoints), *listen, *options]
    log = folder / f"gateway-{http_port}.log"
    return Process(
        command,
        http_port,
        log,
        environment or {},
        ready_path="/ready",
        grpc_port=grpc_port if grpc else None,
    )


async def metrics_of(url: str) -> dict[str, float]:
    """A Prometheus page: the sum over the series of each name.

    Raises:
        aiohttp.ClientError: it cannot be read.
    """
    sums: dict[str, float] = {}
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        text = await response.text()
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0]
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums
