"""The simulated engine without a process of its own: hundreds of replicas fit on one machine.

With `engine_args: [--sim-inside]` a replica simulates its engine in its own process and answers on
a port of its own, as a real one does. What is saved is the engine's process, its guard, and the
questions that are otherwise asked over HTTP. Only with an own process can the engine die alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from pathlib import Path

from aiohttp import web

from cluster.devices import HeldDevices
from cluster.engines import vllm_output
from cluster.engines.adapter import EngineFacts, EngineLoad, Rank
from cluster.engines.sim import SimEngine
from cluster.engines.sim_options import parse_options
from cluster.engines.sim_server import LOG_FORMAT, SimulatedEngine, listen
from cluster.engines.sim_server import logger as engine_log
from cluster.errors import EngineFailed
from cluster.processes import tail
from placement.plan import Variant

_LOG_TAIL_LINES = 30
_STOP_S = 5.0


class SimInside:
    """One engine on the running event loop; to be used as `cluster.engine_process.EngineProcess`."""

    def __init__(self, variant: Variant, *, host: str, log: Path) -> None:
        self._variant = variant
        self._host = host
        self._engine: SimulatedEngine | None = None
        self._runner: web.AppRunner | None = None
        self._stepping: asyncio.Task[None] | None = None
        self._devices: HeldDevices | None = None
        self._loop = asyncio.get_running_loop()
        self.log = log
        self.api_key = secrets.token_urlsafe(24)
        self.url = ""
        self.stage = "waiting for weights"
        self.facts = EngineFacts()
        self.load = EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)

    @property
    def pid(self) -> int:
        """The replica's own."""
        return os.getpid()

    @property
    def ended(self) -> bool:
        """Whether the engine was started and steps no more."""
        return self._stepping is not None and self._stepping.done()

    async def start(
        self, checkpoint: Path | str, devices: HeldDevices | None = None, rank: Rank | None = None
    ) -> None:
        """Listen on a free port; `stage` tells how far it is. The devices are held until the end.

        Raises:
            EngineFailed: its flags make no sense.
        """
        if rank is not None:
            raise EngineFailed(
                f"{self._variant.variant}: an engine inside of a replica has no ranks"
            )
        self._devices = devices
        launch = SimEngine().launch(
            self._variant, checkpoint=checkpoint, host=self._host, port=0, api_key=self.api_key
        )
        _, _, _, *flags = launch.command  # python -m MODULE
        try:
            options = parse_options(flags)
        except SystemExit as error:
            raise EngineFailed(
                f"{self._variant.variant}: flags of the simulated engine that make no sense: "
                f"{' '.join(flags)}; see the `--sim-` ones in `engine_args`"
            ) from error
        self.stage = "starting the engine"
        self._write_log()
        self._engine, self._runner = await listen(options, self.api_key)
        self._stepping = asyncio.create_task(self._engine.run())
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self.facts = vllm_output.facts(self.log.read_text(errors="replace"))
        self.stage = ""

    def _write_log(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self.log)
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        engine_log.addHandler(handler)
        engine_log.setLevel(logging.INFO)

    def note_stage(self, stage: str) -> None:
        """What goes on before it starts."""
        self.stage = stage

    async def observe(self) -> bool:
        """Refresh `load`; False when the engine steps no more."""
        if self._engine is None or self.ended:
            return False
        self.load = self._engine.load()
        return True

    async def drained(self, timeout_s: float) -> None:
        """Wait until nothing runs, at most `timeout_s`; idle means idle twice."""
        idle = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while idle < 2 and await self.observe():
                    idle = idle + 1 if self.load.running + self.load.waiting == 0 else 0
                    await asyncio.sleep(0.5)

    def stop(self) -> None:
        """Listen no more. Called from a thread beside the event loop's."""
        if self._stepping is not None:
            ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            with contextlib.suppress(TimeoutError):  # a client that hangs on ends with the process
                ending.result(_STOP_S)

    async def _end(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    def kill(self) -> None:
        """It ends with this process."""

    def log_tail(self) -> str:
        """The last lines of the engine's output."""
        return tail(self.log, _LOG_TAIL_LINES)
