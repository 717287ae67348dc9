"""The start of a gang goes on only as long as all of its ranks live. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from cluster.errors import EngineFailed

CAUSE_S = 2.0  # within which a rank that died is heard of
_LOOK_PERIOD_S = 0.5


async def unless_fault(
    start: Coroutine[Any, Any, None],
    fault: Callable[[], str],
    leader_ended: Callable[[], bool],
    *,
    cause_s: float = CAUSE_S,
) -> None:
    """Go through `start`, which is given up when `fault` says why.

    Of ranks that die of each other the leader's is heard of first, as `start` fails: so what another
    one says within `cause_s` counts instead.

    Raises:
        EngineFailed: the gang will not come up.
    """
    starting = asyncio.create_task(start)
    watching = asyncio.create_task(_until(fault))
    try:
        await asyncio.wait((starting, watching), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            if starting.exception() and leader_ended():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(watching, cause_s)
            return await starting
        return await watching
    finally:
        starting.cancel()
        watching.cancel()


async def _until(fault: Callable[[], str]) -> None:
    while True:
        if why := fault():
            raise EngineFailed(why)
        await asyncio.sleep(_LOOK_PERIOD_S)
