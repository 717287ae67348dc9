"""EngineProcess: one engine's life on this node, from command line to last request. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import subprocess
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import aiohttp
import psutil

from cluster.devices import HeldDevices
from cluster.engines.adapter import Engine, EngineFacts, EngineLoad, Rank, num_ports
from cluster.errors import EngineFailed
from cluster.processes import free_ports_in_a_row, start_guarded, stop_guarded, tail
from placement.plan import Variant

LOG_TAIL_LINES = 30
POLL_S = 0.2
HEALTH_TIMEOUT_S = 2.0


class EngineProcess:
    """Starts `engine` for `variant`, listening on `host`, its output in `log`."""

    def __init__(self, engine: Engine, variant: Variant, *, host: str, log: Path) -> None:
        self._engine = engine
        self._variant = variant
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        self._read = 0  # bytes of the log
        self.log = log
        self.api_key = secrets.token_urlsafe(24)
        self.url = ""
        self.stage = "waiting for weights"
        self.facts = EngineFacts()
        self.load = EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)

    @property
    def pid(self) -> int:
        """Of the guard that holds the engine; 0 before the start."""
        return self._process.pid if self._process else 0

    @property
    def ended(self) -> bool:
        """Whether the engine was started and has ended."""
        return self._process is not None and self._process.poll() is not None

    @property
    def status(self) -> int | None:
        """That the engine ended with; None: it runs, or was not started."""
        return self._process.poll() if self._process else None

    async def start(
        self, checkpoint: Path | str, devices: HeldDevices | None = None, rank: Rank | None = None
    ) -> None:
        """Start the engine and wait until it answers; `stage` tells how far it is.

        The port was free a moment ago, but another server may have taken it since: what answers
        must know our key and the model.

        Raises:
            EngineFailed: it ended before that; the message holds the end of its log.
        """
        self.launch(checkpoint, devices, rank)
        async with aiohttp.ClientSession() as session:
            while not (await self._healthy(session) and await self._is_ours(session)):
                self.follow_log()
                await asyncio.sleep(POLL_S)
                self._refuse_end()
        self._refuse_end()  # what answered last was another server
        self.read_facts()
        self.stage = ""

    def launch(
        self, checkpoint: Path | str, devices: HeldDevices | None = None, rank: Rank | None = None
    ) -> None:
        """Start the process, on these devices only, as this rank of a gang; do not wait.

        Raises:
            EngineFailed: the engine cannot be spread over nodes.
        """
        port = free_ports_in_a_row(num_ports(self._variant), self._host)
        self.url = f"http://{self._host}:{port}"
        launch = self._engine.launch(
            self._variant,
            checkpoint=checkpoint,
            host=self._host,
            port=port,
            api_key=self.api_key,
        )
        if rank is not None:
            launch = self._engine.ranked(launch, rank)
        self.stage = "starting the engine"
        self._process = start_guarded(
            launch.command,
            log=self.log,
            env={**launch.env, **(devices.environment if devices else {})},
            grace_s=5.0,
            files=devices.files if devices else (),
        )
        if devices:
            devices.let_go()

    def read_facts(self) -> None:
        """Note what the log tells about memory."""
        self.facts = self._engine.facts(self.log.read_text(errors="replace"))

    async def observe(self) -> bool:
        """Refresh `load`; False when the engine does not say that it is healthy."""
        async with aiohttp.ClientSession() as session:
            if not await self._healthy(session):
                return False
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                self.load = await self._metrics(session)
            return True

    async def drained(self, timeout_s: float) -> None:
        """Wait until nothing runs, at most `timeout_s`.

        Gateways may still send for a moment, until they have the new table: idle means idle twice.
        An answer that is none says nothing of what runs; only when nobody listens any more, or the
        engine has ended, is there nothing to wait for.
        """
        idle = 0
        with contextlib.suppress(TimeoutError, aiohttp.ClientConnectorError):
            async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
                while idle < 2 and not self.ended:
                    try:
                        load = await self._metrics(session)
                    except aiohttp.ClientConnectorError:
                        raise
                    except (aiohttp.ClientError, TimeoutError):  # llama.cpp: between steps only
                        idle = 0
                    else:
                        idle = idle + 1 if load.running + load.waiting == 0 else 0
                    await asyncio.sleep(0.5)

    def stop(self) -> None:
        """End the engine and all it started; returns when nothing is left."""
        if self._process:
            stop_guarded(self._process)

    def kill(self) -> None:
        """End an engine that answers nothing, which SIGTERM would hardly move; then as `stop`."""
        if self._process:
            with contextlib.suppress(psutil.NoSuchProcess):
                for engine in psutil.Process(self._process.pid).children():
                    engine.kill()
            self.stop()

    def note_stage(self, stage: str) -> None:
        """What goes on before the engine starts."""
        self.stage = stage

    def log_tail(self) -> str:
        """The last lines of the engine's output."""
        return tail(self.log, LOG_TAIL_LINES)

    def _refuse_end(self) -> None:
        if self._process is not None and self.ended:
            raise EngineFailed(
                f"{self._variant.variant}: the engine ended with status "
                f"{self._process.returncode} before it was ready; the end of {self.log}:\n"
                f"{self.log_tail()}"
            )

    def follow_log(self) -> None:
        """Note the stage that new log lines tell."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            file.seek(self._read)
            for line in file.read().decode(errors="replace").splitlines():
                self.stage = self._engine.stage(line) or self.stage
            self._read = file.tell()

    async def _healthy(self, session: aiohttp.ClientSession) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            timeout = aiohttp.ClientTimeout(HEALTH_TIMEOUT_S)
            async with session.get(f"{self.url}/health", timeout=timeout) as response:
                return response.status == 200
        return False

    async def _is_ours(self, session: aiohttp.ClientSession) -> bool:
        """Whether what listens takes our key and serves our model."""
        other_forms = (ValueError, LookupError, TypeError)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, *other_forms):
            async with session.get(
                f"{self.url}/v1/models",
                headers=self._key,
                timeout=aiohttp.ClientTimeout(5),
            ) as response:
                if response.status != HTTPStatus.OK:
                    return False
                served = [model["id"] for model in (await response.json())["data"]]
                return self._variant.model in served
        return False

    async def _metrics(self, session: aiohttp.ClientSession) -> EngineLoad:
        pages = []
        for path in self._engine.load_paths:
            async with session.get(
                f"{self.url}{path}", headers=self._key, timeout=aiohttp.ClientTimeout(5)
            ) as response:
                response.raise_for_status()
                pages.append(await response.text())
        load, room = self._engine.load(*pages), self.facts.kv_cache_tokens
        if load.kv_cache_tokens is None or not room:
            return load
        return replace(load, kv_cache_usage=min(1.0, load.kv_cache_tokens / room))

    @property
    def _key(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"}
