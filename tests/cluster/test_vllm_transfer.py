"""Two real vLLMs on the CPU, one of which reads prompts for the other, behind a gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cluster.checkpoints import locate
from cluster.engine_process import EngineProcess
from cluster.engines.vllm import VllmEngine
from placement.routing_policy import Role
from tests.cluster.test_vllm_engine import Configuration, planned
from tests.gateway.engines import CHAT, a_client, a_gateway, a_table, an_endpoint, metric

pytestmark = pytest.mark.engine

PROMPT = "The bora falls from the plateau to the sea. " * 20
CONNECTORS: dict[str, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}


@asynccontextmanager
async def an_engine_that(role: Role, folder: Path) -> AsyncIterator[EngineProcess]:
    whole = planned(Configuration("nano-mixtral"))
    config = {
        "kv_connector": "NixlConnector",
        "kv_role": CONNECTORS[role],
        "kv_load_failure_policy": "recompute",
    }
    flag = f"--kv-transfer-config={json.dumps(config)}"
    shape = whole.shape.model_copy(update={"engine_args": (*whole.shape.engine_args, flag)})
    variant = whole.model_copy(update={"role": role, "shape": shape})
    process = EngineProcess(VllmEngine(), variant, host="127.0.0.1", log=folder / f"{role}.log")
    try:
        await process.start(locate(variant))
        yield process
    finally:
        process.stop()


def an_endpoint_of(process: EngineProcess, role: Role) -> Any:
    return an_endpoint(process.url, id=role, role=role, engine="vllm", api_key=process.api_key)


def a_request(number: int, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{number}: {PROMPT}"}]
    asked = {"model": "chat", "messages": messages, "temperature": 0, "max_tokens": 24}
    return {**asked, "ignore_eos": True, **changes}


async def text_of(session: aiohttp.ClientSession, asked: dict[str, Any]) -> str:
    async with session.post(CHAT, json=asked) as response:
        body = await response.text()
        assert response.status == 200, body
    if not asked.get("stream"):
        return str(json.loads(body)["choices"][0]["message"]["content"])
    chunks = [json.loads(e[6:]) for e in body.split("\n\n") if e.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def directly(process: EngineProcess) -> aiohttp.ClientSession:
    headers = {"authorization": f"Bearer {process.api_key}"}
    return aiohttp.ClientSession(process.url, headers=headers)


async def test_a_cache_that_was_fetched_gives_the_same_text_and_a_lost_engine_does_too(
    tmp_path: Path,
) -> None:
    async with (
        an_engine_that("prefill", tmp_path) as reader,
        an_engine_that("decode", tmp_path) as writer,
        a_gateway(
            a_table(an_endpoint_of(reader, "prefill"), an_endpoint_of(writer, "decode")),
            limits={"prefill_min_tokens": 64},
        ) as gateway,
        a_client(gateway) as client,
        directly(reader) as at_reader,
        directly(writer) as at_writer,
    ):
        for number, stream in enumerate((False, True)):
            asked = a_request(number, stream=stream)
            assert await text_of(client, asked) == await text_of(at_reader, asked) != ""
        fetched = await metric(at_writer, "vllm:external_prefix_cache_hits_total")
        assert fetched == await metric(at_writer, "vllm:prefix_cache_queries_total") > 0

        reader.kill()
        asked = a_request(3)
        assert await text_of(client, asked) == await text_of(at_writer, asked) != ""
        name = "bora_gateway_prefill_duration_seconds_count"
        assert await metric(client, name, outcome="handed_over") == 2
        assert await metric(client, name, outcome="failed") == 1
