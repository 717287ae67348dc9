"""EngineProcess with real processes: our engine is told from another server on its port."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.engine_process import EngineProcess
from cluster.engines.adapter import Launch
from cluster.engines.sim import SimEngine
from cluster.errors import EngineFailed
from placement.plan import Variant
from tests.builders import a_variant


@dataclass(frozen=True, slots=True)
class Elsewhere(SimEngine):
    """An engine whose port somebody took first: it runs `code` and never listens there."""

    code: str = ""

    def launch(
        self, variant: Variant, *, checkpoint: Path | str, host: str, port: int, api_key: str
    ) -> Launch:
        del variant, checkpoint, api_key
        return Launch((sys.executable, "-c", self.code.format(host=host, port=port)), {})


def a_process(tmp_path: Path, engine: SimEngine) -> EngineProcess:
    return EngineProcess(engine, a_variant(), host="127.0.0.1", log=tmp_path / "engine.log")


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


async def test_an_engine_that_ends_while_it_starts_is_told_with_its_log(tmp_path: Path) -> None:
    engine = Elsewhere(code="print('no memory'); raise SystemExit(3)")
    async with stopping(a_process(tmp_path, engine)) as process:
        with pytest.raises(EngineFailed, match=r"(?s)status 3 .* no memory|status 3.*\nno memory"):
            await process.start("nowhere")
