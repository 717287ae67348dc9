"""GatewayHost: an actor that keeps one gateway process running on its node."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path

import ray

from cluster.files import write_private
from cluster.names import CONTROLLER, GATEWAY, NAMESPACE
from cluster.processes import start_guarded, stop_guarded, tail

DRAIN_TIMEOUT_S = 35.0
STOP_S = DRAIN_TIMEOUT_S + 10.0  # by then one that is there has ended
RESTART_DELAYS_S = (0.1, 0.5, 1.0, 2.0, 5.0)  # for one that ends again and again
SETTLED_S = 30.0  # one that has served for so long is started again at once
_TELL_S = 1.0


def gateway_name(index: int) -> str:
    """Of the actor that keeps a gateway; the first is the one beside the controller."""
    return GATEWAY if index == 0 else f"{GATEWAY}-{index}"


def gateway_actors() -> list[str]:
    """Names of those that there are."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return sorted(name for name in names if name.startswith(GATEWAY))


class GatewayHost:
    """Runs `python -m gateway ARGUMENTS`, output in `log_file`, and starts it again when it ends."""

    def __init__(self, arguments: list[str], token: str, log_file: str) -> None:
        self._log_file = Path(log_file)
        token_file = self._log_file.with_suffix(".token")
        token_file.parent.mkdir(parents=True, exist_ok=True)
        write_private(token_file, token)
        self._command = [sys.executable, "-m", "gateway", *arguments]
        kept = self._log_file.with_suffix(".kept")
        kept.unlink(missing_ok=True)  # Ray's head is up: the controller tells what is true now
        self._command += ["--token-file", str(token_file), "--kept-file", str(kept)]
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it once."""
        if self._task is None:
            self._task = asyncio.create_task(self._run_forever())

    async def stop(self) -> None:
        """Let running streams finish, then end the gateway."""
        self._stop.set()
        if self._task is not None:
            await self._task

    async def _run_forever(self) -> None:
        ends = 0
        while not self._stop.is_set():
            started_s = time.monotonic()
            process = start_guarded(self._command, log=self._log_file, grace_s=DRAIN_TIMEOUT_S)
            ended = asyncio.create_task(asyncio.to_thread(process.wait))
            stopped = asyncio.create_task(self._stop.wait())
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                await asyncio.to_thread(stop_guarded, process, DRAIN_TIMEOUT_S + 5)
                return
            stopped.cancel()
            # While Ray's head is down nobody can be told, and clients wait here.
            if self._telling is None or self._telling.done():
                self._telling = asyncio.create_task(self._tell_controller())
                await asyncio.wait({self._telling}, timeout=_TELL_S)
            ends = 0 if time.monotonic() - started_s > SETTLED_S else ends + 1
            await asyncio.sleep(RESTART_DELAYS_S[min(ends, len(RESTART_DELAYS_S) - 1)])

    async def _tell_controller(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            controller = await asyncio.to_thread(ray.get_actor, CONTROLLER, NAMESPACE)
            await controller.gateway_ended.remote(tail(self._log_file, 10))
