"""The engines of the drill, and what befalls them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from loadtests.drill_processes import Process, free_ports
from loadtests.processes import CannotRun

MODEL = "chat"
_HANDS_OVER = (
    '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_load_failure_policy":"recompute"}'
)
_VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True, slots=True)
class EngineKind:
    """Simulated engines, or real vLLM on the CPU serving the folder `checkpoint`."""

    checkpoint: Path | None = None
    tpot_ms: float = 10.0
    hands_over: bool = False  # KV caches, from those that read prompts to those that answer

    @property
    def simulated(self) -> bool:
        """It has every fault; else processes can only be killed and frozen."""
        return self.checkpoint is None

    def process(self, port: int, folder: Path) -> Process:
        """One engine, not started yet."""
        log = folder / f"engine-{port}.log"
        if self.checkpoint is None:
            command = [sys.executable, "-m", "cluster.engines.sim_server", "--model", MODEL]
            command += ["--port", str(port), "--drill", "--max-model-len", "4096"]
            command += ["--tpot-ms", str(self.tpot_ms), "--tpot-ms-at-max", str(self.tpot_ms)]
            if self.hands_over:
                command += ["--kv-transfer-config", _HANDS_OVER]
            return Process(command, port, log)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        command += ["--model", str(self.checkpoint), "--served-model-name", MODEL]
        command += ["--dtype", "float32", "--max-model-len", "2048", "--port", str(port)]
        if (self.checkpoint / "params.json").exists():
            for option in ("tokenizer-mode", "config-format", "load-format"):
                command += [f"--{option}", "mistral"]
        return Process(command, port, log, _VLLM_ENVIRONMENT)


class Engines:
    """Some engines under drill."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.processes = processes
        self.num_killed = 0

    async def set_fault(self, number: int, **fault: Any) -> None:
        """From now on engine `number` fails so (see `cluster.engines.sim_drill`).

        Raises:
            CannotRun: the engine refused.
        """
        url = f"{self.processes[number].url}/drill"
        async with aiohttp.ClientSession() as session, session.post(url, json=fault) as response:
            if response.status != 200:
                raise CannotRun(f"{url}: {await response.text()}")

    async def departures(self) -> dict[str, float | None]:
        """Request id -> time at which its engine saw its client leave, if it did, of all engines."""
        seen: dict[str, float | None] = {}
        async with aiohttp.ClientSession() as session:
            for process in self.processes:
                async with session.get(f"{process.url}/drill") as response:
                    told = await response.json()
                seen |= dict.fromkeys(told["arrivals"])
                seen |= {one["request_id"]: one["at_s"] for one in told["departures"]}
        return seen

    async def kill_in_turn(self, every_s: float, down_s: float, among: int | None = None) -> None:
        """For ever: one engine dies, is started again on its port, and the next one's turn comes.

        `among` the first so many.
        """
        mortal = self.processes[:among]
        while True:
            process = mortal[self.num_killed % len(mortal)]
            await asyncio.sleep(every_s)
            process.kill()
            self.num_killed += 1
            await asyncio.sleep(down_s)
            await process.start()

    async def freeze_in_turn(self, every_s: float, frozen_s: float) -> None:
        """For ever: one engine's process is stopped in the middle of everything, and goes on."""
        while True:
            process = self.processes[self.num_killed % len(self.processes)]
            await asyncio.sleep(every_s)
            process.freeze()
            self.num_killed += 1
            try:
                await asyncio.sleep(frozen_s)
            finally:
                process.thaw()


@asynccontextmanager
async def running(kind: EngineKind, count: int, folder: Path) -> AsyncIterator[Engines]:
    """`count` engines that are ready; they are gone at the end of the block."""
    processes = [kind.process(port, folder) for port in free_ports(count)]
    try:
        await asyncio.gather(*(process.start(300) for process in processes))
        yield Engines(processes)
    finally:
        for process in processes:
            process.kill()


@asynccontextmanager
async def meanwhile(work: Any) -> AsyncIterator[None]:
    """Runs the coroutine beside the block, and ends it with the block."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def nano_checkpoint() -> Path:
    """Where the small real model lies; it is written if it does not exist yet.

    Raises:
        CannotRun: it cannot be made.
    """
    import subprocess  # noqa: PLC0415

    program = "from cluster.nano import ensure; print(ensure('nano-mixtral'))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ
    )
    if done.returncode:
        raise CannotRun(f"no nano-mixtral: {done.stderr.strip()[-300:]}")
    return Path(done.stdout.strip().splitlines()[-1])
