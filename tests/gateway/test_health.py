"""Engines that reset, hang, answer garbage or come back, seen from a gateway with health checks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from gateway.config import Limits
from gateway.health import HealthChecker, discovery_of
from gateway.routing import Discovery, Router
from gateway.server import Gateway
from tests.gateway.engines import (
    CHAT,
    PATIENCE_S,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
    metric,
    running,
    until,
)

QUICK = {"health_interval_s": 0.05, "health_timeout_s": 0.15, "health_failures": 2}


@dataclass
class BadServer:
    """What it does with each connection is a field; `asks` are the requests' first lines."""

    answer: bytes | None = None  # None: it never answers
    resets: bool = False
    url: str = ""
    asks: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                self.asks.append(line)
                while (await reader.readline()).strip():
                    pass
                if self.resets:
                    writer.transport.abort()
                    return
                if self.answer is not None:
                    writer.write(self.answer)
                    await writer.drain()
                    writer.close()
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @property
    def posts(self) -> int:
        return sum(ask.startswith(b"POST") for ask in self.asks)


@asynccontextmanager
async def a_bad_server(**behaviour: object) -> AsyncIterator[BadServer]:
    bad = BadServer(**behaviour)
    server = await asyncio.start_server(bad.serve, "127.0.0.1", 0)
    bad.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield bad
    finally:
        server.close()
        await asyncio.sleep(0.01)


@dataclass
class Health:
    """The part of an engine that checks ask, with how many did at once."""

    status: int = 200
    delay_s: float = 0.0
    models: object = None
    asked: int = 0
    now: int = 0
    most: int = 0
    hosts: set[str] = field(default_factory=set)
    keys: set[str | None] = field(default_factory=set)

    async def health(self, request: web.Request) -> web.Response:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        self.hosts.add(request.host)
        await asyncio.sleep(self.delay_s)
        self.now -= 1
        return web.Response(status=self.status)

    async def list_models(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("authorization"))
        return web.json_response(self.models)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.list_models)
        return app


@asynccontextmanager
async def listening(
    app: web.Application, port: int, *, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, host, port, reuse_address=True).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def checking(
    router: Router, *, revived: list[str] | None = None, **limits: float
) -> AsyncIterator[list[str]]:
    """A checker at work; yields the keys of endpoints that died."""
    dead: list[str] = []
    checker = HealthChecker(
        router,
        Limits(**{**QUICK, **limits}),
        on_dead=dead.append,
        on_revived=([] if revived is None else revived).append,
        seed=1,
    )
    task = asyncio.create_task(checker.run())
    try:
        yield dead
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def breaker_of(gateway: Gateway, url: str) -> str:
    router, now = gateway.admission.router, asyncio.get_running_loop().time()
    return next(each.breaker for each in router.snapshot(now) if each.url == url)


async def ask(client: object, **changes: object) -> int:
    async with client.post(CHAT, json=a_chat(**changes)) as response:
        await response.read()
        return response.status


async def test_requests_at_an_engine_that_hangs_are_given_up_and_others_go_elsewhere() -> None:
    async with a_bad_server() as hole, an_engine() as well:
        table = a_table(an_endpoint(hole.url, id="hole"))
        async with a_gateway(table, limits=QUICK) as gateway, a_client(gateway) as client:
            stuck = asyncio.ensure_future(ask(client, stream=True))
            await until(lambda: hole.posts == 1)

            assert await asyncio.wait_for(stuck, PATIENCE_S) == 502

            gateway.apply(a_table(an_endpoint(hole.url, id="hole"), an_endpoint(well), version=2))
            assert [await ask(client) for _ in range(4)] == [200] * 4
            assert hole.posts == 1
            dead = {"endpoint": "hole"}
            assert await metric(client, "bora_gateway_endpoint_alive", **dead) == 0
            gateway.apply(a_table(an_endpoint(well), version=3))
            text = await (await client.get("/metrics")).text()
            assert 'bora_gateway_endpoint_alive{endpoint="hole"' not in text
            assert in_flight(gateway) == 0


async def test_an_engine_that_answers_again_gets_requests_again() -> None:
    health = Health(status=503)
    async with running(health.app()) as url:
        router = Router()
        router.apply(a_table(an_endpoint(url)))
        revived: list[str] = []
        async with checking(router, revived=revived) as dead:
            await until(lambda: dead == [url])
            assert router.num_ready("chat") == 0

            health.status = 200

            await until(lambda: router.num_ready("chat") == 1)
            assert revived == ["chat"]


@pytest.mark.parametrize("status", [200, 401, 404, 405])
async def test_any_answer_but_a_failure_of_its_own_is_a_sign_of_life(status: int) -> None:
    health = Health(status=status)
    async with running(health.app()) as url:
        router = Router()
        router.apply(a_table(an_endpoint(url)))
        async with checking(router, health_timeout_s=PATIENCE_S) as dead:
            await until(lambda: health.asked > 2 * QUICK["health_failures"])

        assert dead == []


@pytest.mark.parametrize(
    "behaviour", [{"answer": b"\x16\x03\x01 not HTTP\r\n\r\n"}, {"resets": True}, {}]
)
async def test_garbage_resets_and_silence_are_no_signs_of_life(behaviour: dict) -> None:
    async with a_bad_server(**behaviour) as bad:
        router = Router()
        router.apply(a_table(an_endpoint(bad.url)))
        async with checking(router) as dead:
            await until(lambda: dead == [bad.url])


async def test_where_nobody_listens_the_endpoint_dies() -> None:
    router = Router()
    router.apply(a_table(an_endpoint("http://127.0.0.1:9")))
    async with checking(router) as dead:
        await until(lambda: bool(dead))


@pytest.mark.parametrize("behaviour", [{"resets": True}, {"answer": b"no HTTP\r\n\r\n"}])
async def test_an_engine_that_breaks_off_every_request_is_left_alone_after_some(
    behaviour: dict,
) -> None:
    async with a_bad_server(**behaviour) as bad, an_engine() as well:
        table = a_table(an_endpoint(bad.url, id="bad"), an_endpoint(well))
        limits = {"suspect_s": 0.05, "suspect_max_s": 60}
        async with a_gateway(table, limits=limits) as gateway, a_client(gateway) as client:
            for _ in range(12):
                assert await ask(client) == 200
                await asyncio.sleep(0.06)

            assert breaker_of(gateway, bad.url) in {"open", "half_open"}
            assert 3 <= bad.posts < 10
            assert await metric(client, "bora_gateway_endpoint_breaker_open", endpoint="bad") == 1


async def test_a_passed_check_closes_a_breaker_before_its_time() -> None:
    async with running(Health().app()) as url:
        port = int(url.rpartition(":")[2])
    limits = {"suspect_s": 60, "health_interval_s": 0.05, "health_failures": 1000}
    async with a_gateway(a_table(an_endpoint(url)), limits=limits) as gateway:
        async with a_client(gateway) as client:
            assert await ask(client) == 503
        assert breaker_of(gateway, url) == "open"

        async with listening(Health().app(), port):
            await until(lambda: breaker_of(gateway, url) == "closed")


async def test_when_all_have_failed_the_next_request_is_still_tried() -> None:
    async with an_engine(die_before_answer=True) as engine:
        limits = {"breaker_failures": 1, "suspect_s": 60}
        async with (
            a_gateway(a_table(an_endpoint(engine)), limits=limits) as gateway,
            a_client(gateway) as client,
        ):
            assert await ask(client) == 502
            assert breaker_of(gateway, engine.url) == "open"
            engine.die_before_answer = False

            assert await ask(client) == 200
            assert breaker_of(gateway, engine.url) == "closed"


async def test_engines_errors_open_the_breaker_and_clients_errors_do_not() -> None:
    async with an_engine(status=400) as engine, an_engine() as other:
        table = a_table(an_endpoint(engine), an_endpoint(other))
        limits = {"suspect_s": 60}
        async with a_gateway(table, limits=limits) as gateway, a_client(gateway) as client:
            for _ in range(20):
                await ask(client)
            assert breaker_of(gateway, engine.url) == "closed"

            engine.status = 500
            seen = len(engine.seen)
            assert {await ask(client) for _ in range(20)} == {200}

            assert breaker_of(gateway, engine.url) == "open"
            assert len(engine.seen) == seen + 3


async def test_full_engines_are_gone_around_without_a_breaker() -> None:
    async with an_engine(status=503) as engine, an_engine() as other:
        table = a_table(an_endpoint(engine), an_endpoint(other))
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            assert {await ask(client) for _ in range(10)} == {200}
            assert breaker_of(gateway, engine.url) == "closed"


async def test_many_engines_are_asked_a_few_at_a_time() -> None:
    health = Health(delay_s=0.05)
    async with listening(health.app(), 0, host="0.0.0.0") as port:
        router = Router()
        hosts = [f"http://127.0.1.{n}:{port}" for n in range(1, 81)]
        router.apply(a_table(*map(an_endpoint, hosts)))
        async with checking(router, health_timeout_s=PATIENCE_S) as dead:
            await until(lambda: len(health.hosts) == 80)

    assert health.most <= 32
    assert dead == []


async def test_an_engine_says_what_it_is_when_it_is_met() -> None:
    card = {"id": "m", "owned_by": "vllm", "max_model_len": 4096}
    health = Health(models={"object": "list", "data": [card]})
    async with running(health.app()) as url:
        router = Router()
        router.apply(a_table(an_endpoint(url, api_key="secret")))
        async with checking(router):
            await until(lambda: router.snapshot(0)[0].engine is not None)

        [told] = router.snapshot(0)
        assert (told.engine, told.max_model_len) == ("vllm", 4096)
        assert router.context("chat") == 4096
        assert health.keys == {"Bearer secret"}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"data": [{"owned_by": "vllm", "max_model_len": 8}]}, Discovery("vllm", 8)),
        ({"data": [{"owned_by": "llamacpp", "meta": {"n_ctx": 512}}]}, Discovery("llamacpp", 512)),
        ({"data": [{"owned_by": "somebody", "max_model_len": "8"}]}, Discovery()),
        ({"data": [{"owned_by": ["x"], "max_model_len": True}]}, Discovery()),
        ({"data": []}, Discovery()),
        ({"data": [7]}, Discovery()),
        ([], Discovery()),
        (None, Discovery()),
    ],
)
def test_what_a_model_list_tells(body: object, found: Discovery) -> None:
    assert discovery_of(json.dumps(body).encode()) == found
    assert discovery_of(b"<html>") == Discovery()
