from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway.responses import holder_digits
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
    running,
    until,
)
from tests.gateway.tenants import a_locked_gateway, a_tenant, bearer

RESPONSES = "/v1/responses"


@dataclass
class StoringEngine:
    """Stores responses, under ids that it makes up or (as vLLM) takes from the request."""

    name: str
    takes_ids: bool
    url: str = ""
    stored: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path_qs))
        if request.path == RESPONSES:
            return await self._create(request)
        response = self.stored.get(request.path.split("/")[3])
        if response is None:
            error = {"message": f"{self.name} has no such response", "code": 404}
            return web.json_response({"error": error}, status=404)
        return web.json_response({**response, "from": self.name})

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.gate:
            await self.gate.wait()
        previous = body.get("previous_response_id")
        if previous is not None and previous not in self.stored:
            return web.json_response({"error": {"message": "unknown", "code": 404}}, status=404)
        own = f"resp_{secrets.token_hex(8)}"
        response_id = body.get("request_id", own) if self.takes_ids else own
        response = {"object": "response", "id": response_id, "model": body["model"]}
        self.stored[response_id] = response
        if not body.get("stream"):
            return web.json_response({**response, "from": self.name})
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        for kind in ("response.created", "response.completed"):
            event = json.dumps({"type": kind, "response": response})
            await stream.write(f"event: {kind}\ndata: {event}\n\n".encode())
        return stream


@asynccontextmanager
async def storing_engines(count: int, *, takes_ids: bool) -> AsyncIterator[list[StoringEngine]]:
    async with AsyncExitStack() as stack:
        engines = [StoringEngine(f"engine-{number}", takes_ids) for number in range(count)]
        for engine in engines:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", engine.handle)
            engine.url = await stack.enter_async_context(running(app))
        yield engines


def endpoints(engines: list[StoringEngine], **changes: Any) -> list[Any]:
    kind = "vllm" if engines[0].takes_ids else ""
    return [an_endpoint(e.url, id=e.name, engine=kind or None, **changes) for e in engines]


async def created(client: aiohttp.ClientSession, **changes: Any) -> dict[str, Any]:
    async with client.post(RESPONSES, json={"model": "chat", "input": "hi", **changes}) as answer:
        if not changes.get("stream"):
            return await answer.json()
        events = (await answer.text()).split("\n\n")
        return json.loads(events[0].partition("data: ")[2])["response"]


@pytest.mark.parametrize("stream", [False, True])
async def test_any_gateway_finds_a_response_by_what_its_id_tells(stream: bool) -> None:
    async with storing_engines(3, takes_ids=True) as engines:
        table = a_table(*endpoints(engines))
        async with a_gateway(table) as one, a_client(one) as client:
            ids = [(await created(client, stream=stream))["id"] for _ in range(9)]
        async with a_gateway(table) as other, a_client(other) as client:
            for response_id in ids:
                async with client.get(f"{RESPONSES}/{response_id}") as answer:
                    found = await answer.json()
                    assert found["id"] == response_id
                    assert holder_digits(found["from"]) == response_id.split("_")[1]

    assert len(set(ids)) == 9
    assert [len(engine.stored) for engine in engines] == [3, 3, 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_ids_that_an_engine_makes_up_are_remembered(stream: bool) -> None:
    async with storing_engines(3, takes_ids=False) as engines:
        table = a_table(*endpoints(engines))
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            for _ in range(9):
                response_id = (await created(client, stream=stream))["id"]
                async with client.get(f"{RESPONSES}/{response_id}") as answer:
                    assert (await answer.json())["id"] == response_id
        async with (
            a_gateway(table) as other,
            a_client(other) as client,
            client.get(f"{RESPONSES}/{response_id}") as answer,
        ):
            assert answer.status == 404
            assert (await answer.json())["error"]["code"] == "response_not_found"

    assert sum(len(engine.asked) for engine in engines) == 18


@pytest.mark.parametrize("takes_ids", [False, True])
async def test_a_follow_up_goes_where_the_response_is(takes_ids: bool) -> None:
    async with (
        storing_engines(4, takes_ids=takes_ids) as engines,
        a_gateway(a_table(*endpoints(engines))) as gateway,
        a_client(gateway) as client,
    ):
        last = await created(client)
        for _ in range(5):
            follow_up = await created(client, previous_response_id=last["id"])
            assert follow_up["from"] == last["from"]
            last = follow_up
        assert in_flight(gateway) == 0


async def test_an_id_of_the_clients_own_is_kept_and_found() -> None:
    async with (
        storing_engines(3, takes_ids=True) as engines,
        a_gateway(a_table(*endpoints(engines))) as gateway,
        a_client(gateway) as client,
    ):
        mine = await created(client, request_id="resp_mine")
        async with client.get(f"{RESPONSES}/resp_mine") as answer:
            assert (await answer.json())["from"] == mine["from"]


async def test_methods_paths_and_queries_reach_the_engine_as_they_came() -> None:
    async with (
        storing_engines(2, takes_ids=True) as engines,
        a_gateway(a_table(*endpoints(engines))) as gateway,
        a_client(gateway) as client,
    ):
        path = f"{RESPONSES}/{(await created(client))['id']}"
        await client.get(f"{path}?stream=true&starting_after=3&include=a")
        await client.delete(path)
        await client.post(f"{path}/cancel")
        await client.get(f"{path}/input_items")

    asked = next(engine.asked for engine in engines if engine.asked)
    assert asked[1:] == [
        ("GET", f"{path}?stream=true&starting_after=3&include=a"),
        ("DELETE", path),
        ("POST", f"{path}/cancel"),
        ("GET", f"{path}/input_items"),
    ]


async def test_a_response_whose_replica_is_gone_is_404_and_nobody_else_is_asked() -> None:
    async with (
        storing_engines(3, takes_ids=True) as engines,
        a_gateway(a_table(*endpoints(engines))) as gateway,
        a_client(gateway) as client,
    ):
        lost = await created(client)
        rest = [engine for engine in engines if engine.name != lost["from"]]
        gateway.apply(a_table(*endpoints(rest), version=2))

        got = await client.get(f"{RESPONSES}/{lost['id']}")
        body = {"model": "chat", "input": "go on", "previous_response_id": lost["id"]}
        followed = await client.post(RESPONSES, json=body)

        for answer, param in ((got, "response_id"), (followed, "previous_response_id")):
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (404, "response_not_found")
            assert error["param"] == param
        assert sum(len(engine.asked) for engine in rest) == 0


async def test_a_holder_that_is_unreachable_is_no_reason_to_ask_another() -> None:
    async with (
        storing_engines(2, takes_ids=True) as engines,
        a_gateway(a_table(*endpoints(engines))) as gateway,
        a_client(gateway) as client,
    ):
        lost = await created(client)
        other = next(engine for engine in engines if engine.name != lost["from"])
        dead = an_endpoint("http://127.0.0.1:9", id=lost["from"], engine="vllm")
        gateway.apply(a_table(*endpoints([other]), dead, version=2))

        async with client.get(f"{RESPONSES}/{lost['id']}") as answer:
            assert answer.status == 503
            assert (await answer.json())["error"]["code"] == "engine_unreachable"
        assert other.asked == []
        assert in_flight(gateway) == 0


async def test_a_holder_that_drains_still_answers_for_what_it_has() -> None:
    async with (
        storing_engines(2, takes_ids=True) as engines,
        a_gateway(a_table(*endpoints(engines))) as gateway,
        a_client(gateway) as client,
    ):
        mine = await created(client)
        gateway.apply(a_table(*endpoints(engines, state="draining"), version=2))

        async with client.get(f"{RESPONSES}/{mine['id']}") as answer:
            assert (await answer.json())["from"] == mine["from"]


async def test_who_waits_for_a_busy_holder_holds_nobody_up() -> None:
    async with storing_engines(2, takes_ids=True) as engines:
        table = a_table(*endpoints(engines, max_in_flight=1))
        async with a_gateway(table) as gateway, a_client(gateway) as client:
            mine = await created(client)
            holder = next(engine for engine in engines if engine.name == mine["from"])
            holder.gate = asyncio.Event()
            follow_up = {"previous_response_id": mine["id"]}
            held = [asyncio.create_task(created(client, **follow_up)) for _ in range(2)]
            await until(lambda: gateway.admission.queued("chat") == 1)

            free = await asyncio.wait_for(created(client), PATIENCE_S)

            assert free["from"] != mine["from"]
            holder.gate.set()
            assert [(await task)["from"] for task in held] == [mine["from"]] * 2


async def test_with_one_endpoint_it_is_asked_whatever_the_id() -> None:
    async with (
        storing_engines(1, takes_ids=True) as engines,
        a_gateway(a_table(*endpoints(engines))) as gateway,
        a_client(gateway) as client,
        client.get(f"{RESPONSES}/resp_from-long-ago") as answer,
    ):
        assert answer.status == 404
        told = (await answer.json())["error"]["message"]
        assert told == "engine-0 has no such response"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/responses/", 404),
        ("GET", "/v1/responses/a/b", 404),
        ("GET", "/v1/responses/a%0d%0ax:%20y", 404),
        ("GET", "/v1/responses/%2e%2e%2fmetrics", 404),
        ("GET", "/v1/responses/a%3fb", 404),
        ("GET", "/v1/responses/" + "a" * 129, 404),
        ("GET", "/v1/responses/%c3%a9", 404),
        ("GET", "/v1/responses/a?x=<script>", 400),
        ("POST", "/v1/responses/a", 405),
        ("GET", "/v1/responses", 405),
        ("GET", "/v1/responses/input_tokens", 405),
        ("DELETE", "/v1/responses/a/cancel", 405),
    ],
)
async def test_what_is_no_stored_response_stays_here(method: str, path: str, status: int) -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        url = aiohttp.client.URL(f"http://127.0.0.1:{gateway.http_port}{path}", encoded=True)
        async with client.request(method, url) as answer:
            assert answer.status == status
            assert (await answer.json())["error"]["type"] == "invalid_request_error"
        assert engine.seen == []


@pytest.mark.parametrize("previous", [3, "", ["resp_1"], {}])
async def test_a_previous_response_id_that_is_none_is_400(previous: Any) -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        body = {"model": "chat", "input": "hi", "previous_response_id": previous}
        async with client.post(RESPONSES, json=body) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["param"] == "previous_response_id"
        assert engine.seen == []


@pytest.mark.parametrize(
    ("status", "body", "passed"),
    [
        (404, {"detail": "Not Found"}, False),
        (405, {"detail": "Method Not Allowed"}, False),
        (404, {"error": {"message": "File Not Found", "type": "not_found_error"}}, False),
        (404, {"error": {"message": "The model `x` does not exist."}}, True),
        (404, {"detail": "No such adapter"}, True),
        (400, {"detail": "Not Found"}, True),
        (404, ["Not Found"], True),
    ],
)
async def test_an_engine_without_the_path_is_told_in_openais_words(
    status: int, body: Any, passed: bool
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    async with (
        running(app) as url,
        a_gateway(a_table(an_endpoint(url))) as gateway,
        a_client(gateway) as client,
        client.post("/v1/embeddings", json={"model": "chat", "input": "x"}) as response,
    ):
        told = await response.json()

        assert response.status == (status if passed else 404)
        if passed:
            assert told == body
        else:
            assert told["error"]["code"] == "endpoint_not_supported"
            assert "/v1/embeddings" in told["error"]["message"]
        assert in_flight(gateway) == 0


async def test_calls_of_other_apis_are_not_touched() -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine, engine="vllm"))) as gateway,
        a_client(gateway) as client,
    ):
        await client.post(CHAT, json=a_chat())
        assert engine.seen[0].json == a_chat()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("takes_ids", [True, False])
async def test_a_stored_response_is_its_tenants_alone(
    takes_ids: bool, count: int, tmp_path: Path
) -> None:
    tenants = a_tenant("acme"), a_tenant("other")
    async with (
        storing_engines(count, takes_ids=takes_ids) as engines,
        a_locked_gateway(tmp_path, a_table(*endpoints(engines)), *tenants) as gateway,
        a_client(gateway) as client,
    ):
        created = {"model": "chat", "input": "hi"}
        async with client.post(RESPONSES, json=created, headers=bearer("acme")) as answer:
            response_id = (await answer.json())["id"]
        path = f"{RESPONSES}/{response_id}"
        follow_up = {**created, "previous_response_id": response_id}

        for name, status in (("acme", 200), ("other", 404)):
            key = bearer(name)
            for method, at in (
                ("GET", path),
                ("GET", f"{path}/input_items"),
                ("POST", f"{path}/cancel"),
            ):
                async with client.request(method, at, headers=key) as answer:
                    assert answer.status == status
            async with client.post(RESPONSES, json=follow_up, headers=key) as answer:
                assert answer.status == status
        num_asked = sum(len(engine.asked) for engine in engines)
        async with client.delete(path, headers=bearer("other")) as answer:
            assert (await answer.json())["error"]["code"] == "response_not_found"
        assert sum(len(engine.asked) for engine in engines) == num_asked


async def test_a_tenant_cannot_store_under_an_id_of_its_choice(tmp_path: Path) -> None:
    async with (
        storing_engines(1, takes_ids=True) as engines,
        a_locked_gateway(tmp_path, a_table(*endpoints(engines)), a_tenant("acme")) as gateway,
        a_client(gateway) as client,
    ):
        asked = {"model": "chat", "input": "hi", "request_id": "resp_1"}
        async with client.post(RESPONSES, json=asked, headers=bearer("acme")) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["param"] == "request_id"
        assert engines[0].asked == []
