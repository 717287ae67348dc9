"""How simulated engines hand KV caches on, with the params and times of vLLM's NIXL connector.

asked with `do_remote_decode`   keeps the prompt's cache for a while, and answers where it is
asked with what that answered   fetches the cache from there; where it is gone, reads the prompt
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ConfigDict, PositiveFloat

from cluster.engines.sim_api import RequestRefused
from cluster.engines.sim_batch import Generation

_BLOCK_TOKENS = 16
_FETCH_TIMEOUT_S = 5.0  # as vLLM waits for the other engine


class TransferConfig(BaseModel):
    """`--kv-transfer-config`, as far as it matters here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    kv_connector: Literal["NixlConnector"]
    kv_role: Literal["kv_producer", "kv_consumer", "kv_both"]
    kv_load_failure_policy: Literal["recompute", "fail"] = "fail"


@dataclass(frozen=True, slots=True)
class Transfer:
    """What is configured. `host` and `port` (0: any free one) are where others fetch.

    `lease_s`: how long a cache is kept that nobody fetches, as vLLM does.
    """

    config: TransferConfig
    host: str = "127.0.0.1"
    port: int = 0
    tokens_per_s: PositiveFloat = 100_000.0
    lease_s: PositiveFloat = 30.0


@dataclass(frozen=True, slots=True)
class _Kept:
    tokens: int
    expiry: asyncio.TimerHandle


class KvTransfer:
    """Of one engine. `free` is told of so many tokens whose cache is kept no longer."""

    def __init__(self, settings: Transfer, *, speed: float, free: Callable[[int], None]) -> None:
        self._settings = settings
        self._speed = speed
        self._free = free
        self._kept: dict[str, _Kept] = {}
        self._port = settings.port
        self._engine_id = str(uuid4())
        self._session: aiohttp.ClientSession | None = None

    async def listen(self, _: web.Application) -> AsyncIterator[None]:
        """The side channel, from which others fetch, while the application runs."""
        app = web.Application()
        app.router.add_post("/{engine_id}/{request_id}", self._fetched)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, self._settings.host, self._settings.port).start()
        self._port = runner.addresses[0][1]
        timeout = aiohttp.ClientTimeout(_FETCH_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as self._session:
            yield
        for kept in self._kept.values():
            kept.expiry.cancel()
        await runner.cleanup()

    async def prepare(
        self, generation: Generation, params: Mapping[str, Any], request_id: str
    ) -> None:
        """Do what `params` ask for before `generation` is queued.

        Raises:
            RequestRefused: the cache is gone, and `kv_load_failure_policy` says that this is the end.
        """
        if params.get("do_remote_decode"):
            generation.kept_as = f"{request_id}-{uuid4().hex[:8]}"
        elif params.get("do_remote_prefill") and await self._fetch(params):
            generation.prefilled_tokens = generation.prompt_tokens - 1  # the last one is computed

    def finished(self, generation: Generation) -> None:
        """Hold its prompt's cache, if that was asked for, until it is fetched or nobody came."""
        if name := generation.kept_as:
            lease_s = self._settings.lease_s
            expiry = asyncio.get_running_loop().call_later(lease_s, self._let_go, name)
            self._kept[name] = _Kept(generation.prompt_tokens, expiry)

    def params(self, generation: Generation) -> dict[str, Any] | None:
        """`kv_transfer_params` of its answer."""
        tokens = generation.prompt_tokens
        if not generation.kept_as:
            return None
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(1, 1 - (-tokens // _BLOCK_TOKENS)))],
            "remote_engine_id": self._engine_id,
            "remote_request_id": generation.kept_as,
            "remote_host": self._settings.host,
            "remote_port": self._port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": tokens,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": 0,
        }

    async def _fetch(self, params: Mapping[str, Any]) -> bool:
        """Fetch a prompt's cache; False: the prompt must be read here. Raises as `prepare`."""
        tokens = await self._tokens_at(params)
        if tokens is None:
            if self._settings.config.kv_load_failure_policy == "fail":
                raise RequestRefused(
                    "Internal server error", status=500, kind="InternalServerError"
                )
            return False
        await asyncio.sleep(tokens / self._settings.tokens_per_s / self._speed)
        return True

    async def _tokens_at(self, params: Mapping[str, Any]) -> int | None:
        """Of the cache that the other engine has given; None: it has none, or there is no engine."""
        names = ("remote_host", "remote_port", "remote_engine_id", "remote_request_id")
        if self._session is None or not all(params.get(name) for name in names):
            return None
        host, port, engine_id, request_id = (params[name] for name in names)
        url = f"http://{host}:{port}/{engine_id}/{request_id}"
        try:
            async with self._session.post(url) as response:
                return int(await response.text()) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None

    async def _fetched(self, request: web.Request) -> web.Response:
        if request.match_info["engine_id"] != self._engine_id:
            raise web.HTTPNotFound
        tokens = self._let_go(request.match_info["request_id"])
        if tokens is None:
            raise web.HTTPNotFound
        return web.Response(text=str(tokens))

    def _let_go(self, request_id: str) -> int | None:
        kept = self._kept.pop(request_id, None)
        if kept is None:
            return None
        kept.expiry.cancel()
        self._free(kept.tokens)
        return kept.tokens
