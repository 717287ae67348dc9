"""EngineProcess with real processes: our engine is told from another server on its port."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cluster.engine_process import EngineProcess
from cluster.engines.adapter import Launch
from cluster.engines.sim import SimEngine
from cluster.errors import EngineFailed
from placement.plan import Variant
from tests.builders import a_shape, a_variant


@dataclass(frozen=True, slots=True)
class Elsewhere(SimEngine):
    """An engine whose port somebody took first: it runs `code` and never listens there."""

    code: str = ""

    def launch(
        self, variant: Variant, *, checkpoint: Path | str, host: str, port: int, api_key: str
    ) -> Launch:
        del variant, checkpoint, api_key
        return Launch((sys.executable, "-c", self.code.format(host=host, port=port)), {})


def a_process(tmp_path: Path, engine: SimEngine, variant: Variant | None = None) -> EngineProcess:
    log = tmp_path / "engine.log"
    return EngineProcess(engine, variant or a_variant(), host="127.0.0.1", log=log)


@asynccontextmanager
async def stopping(process: EngineProcess) -> AsyncIterator[EngineProcess]:
    try:
        yield process
    finally:
        await asyncio.to_thread(process.stop)


# Serves anybody and lists a model, as a vLLM without a key does.
OTHER_SERVER = """
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = {status} if self.path == "/v1/models" else 200
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({body}).encode())
http.server.HTTPServer(("{host}", {port}), Handler).serve_forever()
"""


async def test_an_engine_that_answers_with_our_key_is_ready(tmp_path: Path) -> None:
    async with stopping(a_process(tmp_path, SimEngine())) as process:
        await process.start("nowhere")

        assert process.facts.kv_cache_tokens == a_variant().shape.kv_cache_tokens
        assert await process.observe()
        await process.drained(5)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, '{{"error": "Unauthorized"}}'),
        (200, '{{"data": [{{"id": "other"}}]}}'),
        (200, '["chat"]'),
    ],
)
async def test_another_server_on_the_port_is_not_taken_for_the_engine(
    tmp_path: Path, status: int, body: str
) -> None:
    code = OTHER_SERVER.replace("{status}", str(status)).replace("{body}", body)
    async with stopping(a_process(tmp_path, Elsewhere(code=code))) as process:
        start = asyncio.create_task(process.start("nowhere"))
        async with asyncio.timeout(60):
            while "/v1/models" not in process.log_tail():
                await asyncio.sleep(0.02)

        assert not start.done()

        process.stop()
        with pytest.raises(EngineFailed, match="before it was ready"):
            await start


# Is ready; then its metrics are a fault, a moment of work, and idle again.
UNSTEADY_SERVER = """
import http.server, json
pages = iter([500, 1, 500, 0, 0, 0])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        page = next(pages) if self.path == "/metrics" else 200
        self.send_response(max(page, 200))
        self.send_header("content-type", "application/json")
        self.end_headers()
        metrics = "vllm:num_requests_running " + str(page)
        models = json.dumps({{"data": [{{"id": "chat"}}]}})
        self.wfile.write((metrics if self.path == "/metrics" else models).encode())
        print("told", self.path, page, flush=True)
http.server.HTTPServer(("{host}", {port}), Handler).serve_forever()
"""


async def test_metrics_that_fail_for_a_moment_do_not_end_a_drain(tmp_path: Path) -> None:
    async with stopping(a_process(tmp_path, Elsewhere(code=UNSTEADY_SERVER))) as process:
        await process.start("nowhere")

        await process.drained(60)

        told = [line for line in process.log_tail().splitlines() if line.startswith("told /m")]
        assert [int(line.split()[-1]) for line in told] == [500, 1, 500, 0, 0]


async def test_nothing_is_waited_for_when_the_engine_is_gone(tmp_path: Path) -> None:
    async with stopping(a_process(tmp_path, SimEngine())) as process:
        await process.start("nowhere")
        process.kill()

        await asyncio.wait_for(process.drained(3600), 60)


async def test_an_engine_that_ends_while_it_starts_is_told_with_its_log(tmp_path: Path) -> None:
    engine = Elsewhere(code="print('no memory'); raise SystemExit(3)")
    async with stopping(a_process(tmp_path, engine)) as process:
        with pytest.raises(EngineFailed, match=r"(?s)status 3 .* no memory|status 3.*\nno memory"):
            await process.start("nowhere")


CONFIG = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_load_failure_policy":"fail"}'


async def test_engines_of_two_roles_find_each_other(tmp_path: Path) -> None:
    shape = a_shape(engine_args=(f"--kv-transfer-config={CONFIG}",))
    reader, writer = (a_variant(role=role, shape=shape) for role in ("prefill", "decode"))
    asked = {"model": "chat", "prompt": "The bora falls from the plateau. " * 20, "max_tokens": 5}
    async with (
        stopping(a_process(tmp_path / "p", SimEngine(), reader)) as prefill,
        stopping(a_process(tmp_path / "d", SimEngine(), writer)) as decode,
    ):
        await asyncio.gather(prefill.start("nowhere"), decode.start("nowhere"))
        read = await complete(prefill, {**asked, "kv_transfer_params": {"do_remote_decode": True}})
        params = read["kv_transfer_params"]
        assert params["remote_port"] == int(prefill.url.rpartition(":")[2]) + 1

        # With this policy an engine that cannot fetch the cache gives an error.
        fetched = await complete(decode, {**asked, "kv_transfer_params": params})
        whole = await complete(decode, asked)

    assert fetched["choices"] == whole["choices"]


async def complete(process: EngineProcess, asked: dict[str, Any]) -> Any:
    headers = {"authorization": f"Bearer {process.api_key}"}
    url = f"{process.url}/v1/completions"
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(url, json=asked) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.json()
