"""ControllerLink: how an actor on another node speaks to the controller while Ray's head comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.messages import Orders
from cluster.names import CONTROLLER, NAMESPACE

# No controller, no answer in time; with OSError Ray says that its head was not reached.
UNREACHABLE = (ray.exceptions.RayError, ValueError, OSError)
CALL_S = 5.0
STUCK_S = 90.0  # Ray itself gives a look-up 60 s


def _named() -> Any:
    return ray.get_actor(CONTROLLER, namespace=NAMESPACE)


class ControllerLink:
    """Finds the controller, keeps the handle, and finds it again when it fails.

    While the head is away a look-up of Ray's blocks its thread, for a minute or until the head is
    back and longer. So there is one at a time, and nobody waits for it beyond his own call.
    """

    def __init__(
        self,
        find: Callable[[], Any] = _named,
        *,
        call_s: float = CALL_S,
        stuck_s: float = STUCK_S,
    ) -> None:
        self._find = find
        self._call_s, self._stuck_s = call_s, stuck_s
        self._actor: Any = None
        self._looking: asyncio.Future[Any] | None = None
        self._looking_s = 0.0

    async def report(self, text: str) -> Orders:
        """What `Controller.report` answers.

        Raises:
            UNREACHABLE: no answer within `call_s`, or there is no controller, or it has ended.
        """
        try:
            async with asyncio.timeout(self._call_s):
                if self._actor is None:
                    self._actor = await self._found()
                answer: Orders = await self._actor.report.remote(text)
                return answer
        except UNREACHABLE:
            self._actor = None
            raise

    def report_last(self, text: str) -> None:
        """Best effort of a process that is about to end: at most `call_s`, none without a handle."""
        if self._actor is not None:
            with contextlib.suppress(*UNREACHABLE):
                ray.get(self._actor.report.remote(text), timeout=self._call_s)

    async def _found(self) -> Any:
        stuck = time.monotonic() - self._looking_s > self._stuck_s
        if self._looking is None or self._looking.done() or stuck:
            self._looking_s = time.monotonic()
            self._looking = _in_a_thread(self._find)
        return await asyncio.shield(self._looking)


def _in_a_thread(find: Callable[[], Any]) -> asyncio.Future[Any]:
    """Its result. The thread is nobody's: an executor's would be waited for at the end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    future.add_done_callback(lambda done: done.exception())  # read, should nobody wait any more

    def run() -> None:
        try:
            found, error = find(), None
        except Exception as failure:  # noqa: BLE001 - raised where it is waited for
            found, error = None, failure
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, found, error)

    def settle(found: Any, error: Exception | None) -> None:
        if error is None:
            future.set_result(found)
        else:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="find-controller").start()
    return future
