"""Clients that leave in the middle of a stream, and when the engine gets to know."""

from __future__ import annotations

import asyncio
import random
import time

import aiohttp

from loadtests.drill_engines import MODEL, Engines

_MAX_STAY_S = 1.0
_LEAST_STAY_S = 0.05  # sooner, few requests have reached an engine: there is nothing to cancel
_UNTIL_TOLD_S = 30.0


async def disconnect_latencies_s(
    url: str, engines: Engines, *, requests: int, concurrency: int
) -> tuple[list[float], int]:
    """Leave `requests` endless streams at random points.

    Returns how long after its client's hanging up the engine saw it, for each that had reached an
    engine, and how many of these no engine saw. All processes share one machine's clock.
    """
    left_s: dict[str, float] = {}
    waiting = iter(range(requests))
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(url, connector=connector) as session:

        async def work() -> None:
            for number in waiting:
                name = f"leaver-{number}"
                left_s[name] = await _leave(session, name, stream=number % 4 != 0)

        await asyncio.gather(*(work() for _ in range(concurrency)))
    deadline_s = time.monotonic() + _UNTIL_TOLD_S
    while True:
        seen_s = await engines.departures()
        untold = [name for name in left_s if seen_s.get(name, 0.0) is None]
        if not untold or time.monotonic() > deadline_s:
            break
        await asyncio.sleep(0.05)
    known_s = [(seen_s.get(name), at_s) for name, at_s in left_s.items()]
    return [seen - left for seen, left in known_s if seen is not None], len(untold)


async def _leave(session: aiohttp.ClientSession, name: str, *, stream: bool) -> float:
    """Ask, stay a while, hang up. Returns when that was: `time.time`."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": name}], "ignore_eos": True}
    body |= {"max_tokens": 3000, "stream": stream}
    stay_s = random.uniform(_LEAST_STAY_S, _MAX_STAY_S)  # noqa: S311 - no secret
    asking = asyncio.create_task(_read(session, name, body))
    await asyncio.wait((asking,), timeout=stay_s)
    asking.cancel()
    at_s = time.time()
    await asyncio.wait((asking,))
    return at_s


async def _read(session: aiohttp.ClientSession, name: str, body: dict[str, object]) -> None:
    headers = {"x-request-id": name}
    async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
        async for _ in response.content.iter_any():
            pass
