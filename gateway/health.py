"""Health checks: asks every engine about once a second whether it lives, and once what it is.

An engine that hangs answers nobody, and its requests would wait for ever: after some failed checks in
a row the endpoint is dead, gets no requests, and those that run there are given up.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp

from gateway.config import Limits
from gateway.endpoints import Endpoint, EngineKind
from gateway.routing import Discovery, Router

_AT_ONCE = 32
_CHECKS_PER_S = 50.0  # of one gateway: with more engines each is asked less often
_JITTER = 0.2
_OUR_OWN_DELAY_S = 0.5
_LONGEST_ANSWER_BYTES = 1 << 20
_OWNERS: dict[str, EngineKind] = {"vllm": "vllm", "llamacpp": "llamacpp", "bora-sim": "sim"}


@dataclass(slots=True, eq=False)
class _Watch:
    """One engine."""

    due: float
    known: bool = False  # it has said what it is
    check: asyncio.Task[None] | None = field(default=None)


class HealthChecker:
    """Tells `router` which engines live. `run` it as a task; nothing of it is on a request's way.

    `on_dead` hears the key of an endpoint whose running requests should be given up, `on_revived`
    the model of one that takes requests again.
    """

    def __init__(
        self,
        router: Router,
        limits: Limits,
        *,
        on_dead: Callable[[str], None],
        on_revived: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self._router = router
        self._limits = limits
        self._on_dead = on_dead
        self._on_revived = on_revived
        self._clock = clock
        self._random = Random(seed)  # noqa: S311 - so that not all ask in the same moment
        self._watches: dict[str, _Watch] = {}

    async def look_around(self) -> None:
        """Check every engine once, so that the first requests know what they go to."""
        interval, now = self._limits.health_interval_s, self._clock()
        async with self._session() as session, asyncio.TaskGroup() as checks:
            for url, endpoint in self._router.urls().items():
                watch = _Watch(now + interval * (1 + self._random.random()))
                self._watches[url] = watch
                checks.create_task(self._check(session, endpoint, watch))

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=self._limits.health_timeout_s)
        connector = aiohttp.TCPConnector(limit=_AT_ONCE, limit_per_host=1)
        return aiohttp.ClientSession(timeout=timeout, connector=connector)

    async def run(self) -> None:
        """Check for ever."""
        async with self._session() as session:
            try:
                while True:
                    self._start_due(session)
                    await asyncio.sleep(self._limits.health_interval_s / 4)
            finally:
                for watch in self._watches.values():
                    if watch.check is not None:
                        watch.check.cancel()

    def _start_due(self, session: aiohttp.ClientSession) -> None:
        now, engines = self._clock(), self._router.urls()
        interval = max(self._limits.health_interval_s, len(engines) / _CHECKS_PER_S)
        for url in self._watches.keys() - engines.keys():
            check = self._watches.pop(url).check
            if check is not None:
                check.cancel()
        running = sum(1 for watch in self._watches.values() if _runs(watch))
        for url, endpoint in engines.items():
            watch = self._watches.get(url)
            if watch is None:
                watch = self._watches[url] = _Watch(now + interval * self._random.random() / 2)
            if now < watch.due or _runs(watch) or running >= _AT_ONCE:
                continue
            running += 1
            watch.due = now + interval * (1 + _JITTER * (self._random.random() - 0.5))
            watch.check = asyncio.create_task(self._check(session, endpoint, watch))

    async def _check(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, watch: _Watch
    ) -> None:
        url, started = endpoint.url, self._clock()
        discovery = None
        try:
            alive = await _is_alive(session, url)
            if alive and not watch.known:
                discovery = await discover(session, endpoint)
                watch.known = True
        except (aiohttp.ClientError, TimeoutError, OSError):
            alive = False
        now, router = self._clock(), self._router
        if alive:
            for state in router.check_passed(url, now=now, discovery=discovery):
                self._on_revived(state.endpoint.model)
            return
        if now - started > self._limits.health_timeout_s + _OUR_OWN_DELAY_S:
            return  # this process was held up: that says nothing of the engine
        watch.known = False  # another engine may come up there
        for state in router.check_failed(url, now=now, enough=self._limits.health_failures):
            self._on_dead(state.endpoint.key)


async def discover(session: aiohttp.ClientSession, endpoint: Endpoint) -> Discovery:
    """What `GET /v1/models` tells of an engine. Nothing, where it tells nothing.

    Raises:
        aiohttp.ClientError, TimeoutError: it did not answer.
    """
    headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    async with session.get(f"{endpoint.url}/v1/models", headers=headers) as response:
        if response.status != 200:
            return Discovery()
        return discovery_of(await response.content.read(_LONGEST_ANSWER_BYTES))


def discovery_of(body: bytes) -> Discovery:
    """`owned_by` and the context of the first model in an OpenAI model list."""
    try:
        card = json.loads(body)["data"][0]
    except (ValueError, LookupError, TypeError, RecursionError):
        return Discovery()
    if not isinstance(card, dict):
        return Discovery()
    context = card.get("max_model_len")  # vLLM
    if context is None and isinstance(meta := card.get("meta"), dict):
        context = meta.get("n_ctx")  # llama.cpp
    return Discovery(_OWNERS.get(str(card.get("owned_by"))), _tokens(context))


def _tokens(value: Any) -> int | None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and value > 0 else None


async def _is_alive(session: aiohttp.ClientSession, url: str) -> bool:
    """It answers, with anything but a failure of its own. Not all engines have this path."""
    async with session.get(f"{url}/health", allow_redirects=False) as response:
        return response.status < 500


def _runs(watch: _Watch) -> bool:
    return watch.check is not None and not watch.check.done()
