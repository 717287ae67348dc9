"""The controller's HTTP face, over real HTTP with a controller that only remembers."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cluster.control_api import ControlClient, serve_control_api
from cluster.errors import ClusterError, ClusterUnreachable
from cluster.key_keeper import KeyKeeper
from cluster.messages import (
    Drained,
    DrainRequest,
    Event,
    EventList,
    FleetStatus,
    LogPart,
    LogQuery,
    NodeList,
)
from cluster.processes import free_ports
from gateway.endpoints import EndpointTable, SyncRequest, SyncResponse
from placement.errors import ConfigError, UnknownName
from placement.inventory import Inventory, Pool
from placement.plan import Plan
from tests.builders import a_plan

TOKEN = "the-token"


class RememberingFleet:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def apply(self, plan: Plan) -> None:
        self.calls.append(("apply", plan))

    async def scale(self, model: str, replicas: int) -> None:
        if model == "bug":
            raise ZeroDivisionError("oh")
        if model == "full":
            raise ConfigError("no room")
        if model != "chat":
            raise UnknownName("model", model, ["chat"])
        self.calls.append(("scale", model, replicas))

    async def drain(self, request: DrainRequest) -> Drained:
        self.calls.append(("drain", request.target, request.timeout_s))
        return Drained(replicas=(request.target,))

    async def delete(self, model: str) -> None:
        self.calls.append(("delete", model))


class RememberingControl:
    def __init__(self, folder: Path) -> None:
        self.fleet = RememberingFleet()
        self.calls = self.fleet.calls
        self.keys = KeyKeeper(folder, lambda: None)

    async def sync(self, request: SyncRequest) -> SyncResponse:
        self.calls.append(("sync", request.gateway))
        return SyncResponse(table=EndpointTable(version=3))

    async def stop(self) -> None:
        self.calls.append(("stop",))

    async def inventory(self) -> Inventory:
        return Inventory(pools=(Pool(name="h", gpu="H100-SXM", gpus_per_node=8),))

    async def plan(self) -> Plan | None:
        return next((call[1] for call in self.calls if call[0] == "apply"), None)

    def status(self) -> FleetStatus:
        return FleetStatus(fleet="test", table_version=3, variants=(), gateways=(), events=())

    def events(self, after: int) -> EventList:
        return EventList(events=(Event(number=after + 1, at_s=1.0, text="it happened"),))

    async def logs(self, query: LogQuery) -> LogPart:
        return LogPart(lines=(f"{query.file} on {query.node_id}",), offset=7)

    def nodes(self) -> NodeList:
        return NodeList(nodes=(), pending=("a-00000000",))


@pytest.fixture
async def served(tmp_path) -> AsyncIterator[tuple[RememberingControl, str]]:
    control = RememberingControl(tmp_path)
    [port] = free_ports(1)
    runner = await serve_control_api(control, "127.0.0.1", port, TOKEN)
    yield control, f"http://127.0.0.1:{port}"
    await runner.cleanup()


async def test_every_call_arrives_as_it_was_made(served):
    control, url = served
    client = ControlClient(url, TOKEN)
    plan = a_plan()
    assert await asyncio.to_thread(client.plan) is None

    await asyncio.to_thread(client.apply, plan)
    await asyncio.to_thread(client.scale, "chat", 3)
    drained = await asyncio.to_thread(client.drain, "r1", 60.0)
    await asyncio.to_thread(client.delete, "chat")
    await asyncio.to_thread(client.stop)

    assert control.calls == [
        ("apply", plan),
        ("scale", "chat", 3),
        ("drain", "r1", 60.0),
        ("delete", "chat"),
        ("stop",),
    ]
    assert drained == Drained(replicas=("r1",))
    assert await asyncio.to_thread(client.plan) == plan
    assert (await asyncio.to_thread(client.status)).fleet == "test"
    assert (await asyncio.to_thread(client.inventory)).pools[0].gpu == "H100-SXM"
    assert (await asyncio.to_thread(client.events, 6)).events[0].number == 7
    assert (await asyncio.to_thread(client.nodes)).pending == ("a-00000000",)


@pytest.mark.parametrize("path", ["/v1/status", "/v1/sync", "/v1/stop", "/nowhere"])
@pytest.mark.parametrize(
    "token", [None, "", "Bearer wrong", f"bearer {TOKEN}", TOKEN, "Bearer \xe9"]
)
async def test_nobody_gets_in_without_the_token(served, path, token):
    control, url = served
    headers = {} if token is None else {"authorization": token}
    async with aiohttp.ClientSession() as session:
        for method in ("GET", "POST"):
            async with session.request(method, url + path, headers=headers) as response:
                assert response.status == 401
    assert control.calls == []


async def test_a_gateway_gets_the_table(served):
    _, url = served
    headers = {"authorization": f"Bearer {TOKEN}"}
    body = SyncRequest(gateway="g1").model_dump(mode="json")
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{url}/v1/sync", json=body) as response,
    ):
        assert SyncResponse.model_validate_json(await response.read()).table.version == 3


async def test_a_malformed_message_is_refused_and_does_nothing(served):
    control, url = served
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        for text in ("", "{", "[]", '{"model": 5}', '{"model": "chat", "replicas": "x"}'):
            async with session.post(f"{url}/v1/scale", data=text) as response:
                assert response.status == 400
    assert control.calls == []


async def test_an_unknown_model_comes_back_as_an_error_with_the_nearest_name(served):
    _, url = served
    with pytest.raises(ClusterError, match="chat"):
        await asyncio.to_thread(ControlClient(url, TOKEN).scale, "cat", 1)


@pytest.mark.parametrize(
    ("asked", "token", "exit_code", "said"),
    [
        ("chat", "another", 4, "does not know our token"),
        ("cat", TOKEN, 2, "did you mean 'chat'"),
        ("full", TOKEN, 2, "no room"),
        ("bug", TOKEN, 1, "the controller failed: ZeroDivisionError: oh"),
    ],
)
async def test_who_is_to_blame_shows_in_the_exit_code(served, asked, token, exit_code, said):
    _, url = served
    with pytest.raises(ClusterError, match=said) as caught:
        await asyncio.to_thread(ControlClient(url, token).scale, asked, 1)

    assert caught.value.exit_code == exit_code


async def test_a_bug_in_the_controller_is_logged_with_its_traceback(served, caplog):
    _, url = served
    with pytest.raises(ClusterError):
        await asyncio.to_thread(ControlClient(url, TOKEN).scale, "bug", 1)

    assert "POST /v1/scale failed" in caplog.text
    assert 'raise ZeroDivisionError("oh")' in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/scale", b'{"model": "bug", "replicas": 1}', 500),
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/scale", b"", 405),
        ("GET", "/v1/events?after=-1", b"", 400),
        ("POST", "/v1/apply", io.BytesIO(b" " * (17 * 2**20)), 413),
    ],
)
async def test_every_error_has_a_json_body(served, method, path, body, status):
    _, url = served
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.request(method, url + path, data=body) as response,
    ):
        assert response.status == status
        assert (await response.json())["error"]


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"220 smtp ready\r\n", b""]
)
async def test_another_server_on_the_port_is_not_taken_for_a_controller(answer):
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(ClusterUnreachable, match=url):
            await asyncio.to_thread(ControlClient(url, TOKEN).status)


async def test_a_proxy_of_the_environment_is_not_asked(served, monkeypatch):
    _, url = served
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")

    client = ControlClient(url, TOKEN)

    assert (await asyncio.to_thread(client.status)).fleet == "test"


async def test_a_controller_that_is_not_there_is_unreachable():
    [port] = free_ports(1)
    client = ControlClient(f"http://127.0.0.1:{port}", TOKEN)
    with pytest.raises(ClusterUnreachable, match=str(port)):
        await asyncio.to_thread(client.status)
