from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway.endpoints import EndpointTable, SyncRequest, SyncResponse
from gateway.errors import StartupFailed
from gateway.kept_answer import KeptAnswer
from gateway.table_feed import table_from_file
from placement.errors import ConfigError
from tests.gateway.engines import (
    CHAT,
    PATIENCE_S,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    metric,
    running,
    until,
)


@dataclass
class FakeController:
    """Answers as the real one does: at once with a newer table, else after `wait_s`."""

    table: EndpointTable | None = None
    changed_s: float = 0.0
    away: bool = False
    nonsense: bool = False
    asked: list[SyncRequest] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    async def sync(self, request: web.Request) -> web.Response:
        if self.away:
            raise web.HTTPBadGateway
        if self.nonsense:
            return web.Response(text="<html>")
        self.tokens.add(request.headers.get("authorization", ""))
        question = SyncRequest.model_validate_json(await request.read())
        self.asked.append(question)
        deadline = asyncio.get_running_loop().time() + question.wait_s
        while self.table is None or self.table.version == question.version:
            if asyncio.get_running_loop().time() > deadline:
                return web.Response(text=SyncResponse().model_dump_json())
            await asyncio.sleep(0.01)
        answer = SyncResponse(table=self.table, changed_s=self.changed_s)
        return web.Response(text=answer.model_dump_json())


@asynccontextmanager
async def a_controller(**state: Any) -> AsyncIterator[tuple[FakeController, str]]:
    controller = FakeController(**state)
    app = web.Application()
    app.router.add_post("/v1/sync", controller.sync)
    async with running(app) as url:
        yield controller, url


async def test_a_gateway_follows_its_controller_and_reports_load_for_every_model() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_controller() as (controller, url),
        a_gateway(controller_url=url + "/", controller_token="s3cret") as gateway,
        a_client(gateway) as client,
    ):
        assert (await client.get("/ready")).status == 503
        table = a_table(an_endpoint(engine), an_endpoint(engine, model="code"), version=7)
        controller.table = table
        await until(lambda: gateway.is_ready)
        asked = asyncio.ensure_future(client.post(CHAT, json=a_chat()))
        await until(lambda: engine.running == 1)
        await until(lambda: any(_load(q, "in_flight") > 0.5 for q in controller.asked))
        engine.gate.set()
        assert (await asked).status == 200

        assert controller.tokens == {"Bearer s3cret"}
        assert controller.asked[-1].version == 7
        assert set(controller.asked[-1].loads) == {"chat", "code"}
        assert len({question.gateway for question in controller.asked}) == 1
        assert await metric(client, "bora_gateway_endpoint_table_version") == 7

        controller.table = a_table(version=2)  # the controller was started afresh
        await until(lambda: gateway.admission.table.version == 2)


def _load(question: SyncRequest, name: str) -> float:
    return getattr(question.loads["chat"], name) if "chat" in question.loads else 0.0


@pytest.mark.parametrize("outage", ["away", "nonsense"])
async def test_while_the_controller_is_away_traffic_flows_on(
    outage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with an_engine() as engine, a_controller() as (controller, url):
        controller.table = a_table(an_endpoint(engine))
        async with a_gateway(controller_url=url) as gateway, a_client(gateway) as client:
            await until(lambda: gateway.is_ready)
            setattr(controller, outage, True)
            await until(lambda: "the last table stays" in caplog.text)
            await asyncio.sleep(0.3)

            assert (await client.get("/ready")).status == 200
            assert (await client.post(CHAT, json=a_chat())).status == 200

            setattr(controller, outage, False)
            controller.table = a_table(an_endpoint(engine), version=2)
            await until(lambda: gateway.admission.table.version == 2)
            assert caplog.text.count("the last table stays") == 1


async def test_a_controller_that_is_not_there_yet_is_waited_for() -> None:
    async with a_gateway(controller_url="http://127.0.0.1:9") as gateway:
        await asyncio.sleep(0.05)

        assert not gateway.is_ready


async def test_a_gateway_that_starts_while_the_controller_is_away_serves_by_what_it_told_last(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "gateway.kept"
    async with an_engine() as engine, a_controller() as (controller, url):
        controller.table = a_table(an_endpoint(engine))
        async with a_gateway(controller_url=url, kept_file=kept) as gateway:
            await until(lambda: gateway.is_ready)
        assert kept.stat().st_mode & 0o777 == 0o600
        controller.away = True

        async with (
            a_gateway(controller_url=url, kept_file=kept) as gateway,
            a_client(gateway) as client,
        ):
            await until(lambda: gateway.is_ready)
            assert (await client.post(CHAT, json=a_chat())).status == 200

            controller.away = False
            controller.table = a_table(an_endpoint(engine), version=2)
            await until(lambda: gateway.admission.table.version == 2)


async def test_only_what_the_controller_tells_counts_as_delay(tmp_path: Path) -> None:
    kept, name = tmp_path / "gateway.kept", "bora_gateway_endpoint_table_delay_seconds"
    async with an_engine() as engine, a_controller() as (controller, url):
        controller.table = a_table(an_endpoint(engine))
        controller.changed_s = time.time() - 1000.0
        async with a_gateway(controller_url=url, kept_file=kept) as gateway:
            await until(lambda: gateway.is_ready)
            async with a_client(gateway) as client:
                assert await metric(client, f"{name}_sum") == pytest.approx(1000.0, abs=PATIENCE_S)
        controller.away = True

        async with (
            a_gateway(controller_url=url, kept_file=kept) as gateway,
            a_client(gateway) as client,
        ):
            await until(lambda: gateway.is_ready)

            assert await metric(client, f"{name}_count") == 0


async def test_a_table_is_in_force_also_while_the_disk_is_slow(tmp_path: Path) -> None:
    kept = tmp_path / "gateway.kept"
    slow = kept.with_suffix(f".{os.getpid()}.new")
    os.mkfifo(slow)  # who writes there waits until somebody reads
    async with an_engine() as engine, a_controller() as (controller, url):
        controller.table = a_table(an_endpoint(engine))
        async with a_gateway(controller_url=url, kept_file=kept) as gateway:
            try:
                await until(lambda: gateway.is_ready)
                controller.table = a_table(an_endpoint(engine), version=2)
                await until(lambda: gateway.admission.table.version == 2)
            finally:
                await asyncio.to_thread(slow.read_bytes)

    assert KeptAnswer(kept).read() == SyncResponse(table=controller.table)


async def test_a_kept_answer_that_is_broken_is_told_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "gateway.kept"
    kept.write_text("{")

    async with a_gateway(controller_url="http://127.0.0.1:9", kept_file=kept) as gateway:
        await until(lambda: "gateway.kept is of no use" in caplog.text)

        assert not gateway.is_ready


FILE = """
endpoints:
  - {model: chat, url: "http://127.0.0.1:1"}
  - {model: code, url: "http://127.0.0.1:2", variant: v, max_in_flight: 3}
models:
  - {name: chat, aliases: [gpt]}
"""


def test_a_files_models_are_those_of_its_endpoints(tmp_path: Path) -> None:
    (path := tmp_path / "e.yaml").write_text(FILE)

    table = table_from_file(path, 3)

    assert table.version == 3
    assert [(model.name, model.aliases) for model in table.models] == [
        ("chat", ("gpt",)),
        ("code", ()),
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("gpt", "code"), "two models answer to the name 'code'"),
        (("code", "chat"), None),
        (("max_in_flight: 3", "max_inflight: 3"), "did you mean 'max_in_flight'"),
        (("variant: v", "id: x}\n  - {model: code, url: http://h:3, id: x"), "stands twice"),
        (("http://127.0.0.1:2", "http://127.0.0.1:2/v1"), "pattern"),
        (("[gpt]", "[gpt], fallback: [cod]"), r"models\[0\].fallback: .* did you mean 'code'"),
        (("[gpt]", "[gpt], fallback: [code]"), None),
        (("[gpt]", "[gpt], routing: {weights: {statik: 1}}"), "did you mean 'static'"),
        (("[gpt]", "[gpt], routing: {weights: {static: 1}}"), None),
        (("[gpt]", "[gpt], routing: {policy: fast}"), "'auto'"),
    ],
)
def test_a_files_mistakes_are_named(
    tmp_path: Path, change: tuple[str, str], told: str | None
) -> None:
    (path := tmp_path / "e.yaml").write_text(FILE.replace(*change))

    if told is None:
        assert table_from_file(path, 1).models
        return
    with pytest.raises(ConfigError, match=told):
        table_from_file(path, 1)


async def test_a_changed_file_is_taken_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path := tmp_path / "e.yaml").write_text(FILE)
    async with a_gateway(endpoints_file=path, poll_s=0.02) as gateway:
        with caplog.at_level(logging.ERROR):
            path.write_text("endpoints: [")
            await until(lambda: "the old table stays" in caplog.text)
        assert [model.name for model in gateway.admission.router.models] == ["chat", "code"]

        path.write_text(FILE.replace("code", "embed"))
        await until(lambda: gateway.admission.router.resolve("embed") is not None)
        assert gateway.admission.table.version == 2

        path.unlink()
        await asyncio.sleep(0.1)
        assert gateway.is_ready


async def test_a_gateway_does_not_start_with_a_broken_file(tmp_path: Path) -> None:
    (path := tmp_path / "e.yaml").write_text("endpoints: []")

    with pytest.raises(StartupFailed, match="endpoints"):
        async with a_gateway(endpoints_file=path):
            pass
