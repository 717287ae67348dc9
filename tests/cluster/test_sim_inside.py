"""The simulated engine inside of a replica's process: the same server, without a process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import aiohttp
import pytest

from cluster.engine_process import EngineProcess
from cluster.engines import vllm_output
from cluster.engines.sim_inside import SimInside
from cluster.errors import EngineFailed
from cluster.running_engine import engine_for
from placement.plan import Variant
from tests.builders import a_shape, a_variant


def simulated(*flags: str) -> Variant:
    return a_variant(shape=a_shape(engine="sim", engine_args=("--sim-inside", *flags)))


def an_engine(tmp_path: Path, *flags: str) -> SimInside:
    return SimInside(simulated(*flags), host="127.0.0.1", log=tmp_path / "logs" / "engine.log")


async def test_it_answers_with_its_key_in_the_same_process(tmp_path: Path) -> None:
    engine = an_engine(tmp_path, "--sim-speed=100")
    await engine.start("")
    body = {"model": simulated().model, "prompt": "Hello", "max_tokens": 3}
    key = {"authorization": f"Bearer {engine.api_key}"}

    async with aiohttp.ClientSession() as session:
        async with session.post(f"{engine.url}/v1/completions", json=body) as refused:
            assert refused.status == 401
        async with session.post(f"{engine.url}/v1/completions", json=body, headers=key) as response:
            answer = await response.json()

    assert answer["usage"]["completion_tokens"] == 3
    assert engine.pid == os.getpid()
    assert engine.facts.kv_cache_tokens == simulated().shape.kv_cache_tokens
    assert await engine.observe()
    await asyncio.to_thread(engine.stop)


async def test_it_knows_of_itself_what_its_metrics_tell_others(tmp_path: Path) -> None:
    engine = an_engine(tmp_path, "--sim-speed=100")
    await engine.start("")
    body = {"model": simulated().model, "prompt": "Hello", "max_tokens": 3}
    key = {"authorization": f"Bearer {engine.api_key}"}

    async with aiohttp.ClientSession(headers=key) as session:
        for _ in range(2):
            async with session.post(f"{engine.url}/v1/completions", json=body) as response:
                await response.read()
        async with session.get(f"{engine.url}/metrics") as response:
            told = vllm_output.load(await response.text())
    await engine.observe()
    await asyncio.to_thread(engine.stop)

    assert engine.load == told
    assert engine.load.counters is not None
    assert engine.load.counters == told.counters
    assert engine.load.counters.prompts == 2
    assert engine.load.counters.intervals == 4


async def test_once_stopped_it_has_ended_and_nothing_listens(tmp_path: Path) -> None:
    engine = an_engine(tmp_path)
    await engine.start("")

    await engine.drained(5.0)
    await asyncio.to_thread(engine.stop)
    await asyncio.sleep(0)

    assert engine.ended
    assert not await engine.observe()
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{engine.url}/health")


async def test_flags_that_make_no_sense_are_named(tmp_path: Path) -> None:
    engine = an_engine(tmp_path, "--sim-speed=fast")

    with pytest.raises(EngineFailed, match=r"--speed=fast"):
        await engine.start("")


async def test_only_who_asks_for_it_gets_it(tmp_path: Path) -> None:
    plain = a_variant(shape=a_shape(engine="sim"))

    inside = engine_for(simulated(), host="127.0.0.1", log=tmp_path / "a.log")
    outside = engine_for(plain, host="127.0.0.1", log=tmp_path / "b.log")

    assert isinstance(inside, SimInside)
    assert isinstance(outside, EngineProcess)
