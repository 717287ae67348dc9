import asyncio
import json
import subprocess
import sys
from typing import Any

import aiohttp
import pytest

from cluster.engines.adapter import EngineLoad
from cluster.engines.sim_drill import Fault
from cluster.engines.sim_server import Settings
from tests.cluster.test_sim_server import MESSAGES, ask, serving, settings, until


def drilled(**fault: Any) -> Settings:
    base = settings()
    return Settings("chat", base.limits, base.timing, speed=10.0, fault=Fault(**fault))


TOKEN = b'"delta":{"content"'
WHOLE = b"data: [DONE]\n\n\r\n0\r\n\r\n"
SILENCE_S = 0.5  # many times what a simulated engine takes for all its tokens


async def sent_before_the_end(
    session: aiohttp.ClientSession, *, silent_after: int | None = None
) -> bytes:
    """The bytes of an answer of 20 tokens up to where it breaks; all of it if it does not.

    With `silent_after` it is given up when so many tokens have come and then nothing more. The
    error that ended it comes last.
    """
    url = session._base_url
    body = {"messages": MESSAGES, "max_tokens": 20, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {url.host}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    got = b""
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        writer.write(head.encode() + data)
        while True:
            silent = got.count(TOKEN) == silent_after
            async with asyncio.timeout(SILENCE_S if silent else 60):
                if not (piece := await reader.read(1 << 16)):
                    return got
            got += piece
    except (OSError, TimeoutError) as error:
        return got + type(error).__name__.encode()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("fault", "num_tokens", "end"),
    [
        ({"kind": "silence", "after_tokens": 0}, 0, b"TimeoutError"),
        ({"kind": "silence", "after_tokens": 5}, 5, b"TimeoutError"),
        ({"kind": "reset", "after_tokens": 0}, 0, b"ConnectionResetError"),
        ({"kind": "garbage", "after_tokens": 5}, 5, b"HTTP/9.9 banana\r\n\r\n\r\n"),
        ({"kind": "garbage-event", "after_tokens": 5}, 19, WHOLE),
        ({"kind": "none"}, 20, WHOLE),
    ],
)
async def test_stream_fails_after_so_many_tokens(
    fault: dict[str, Any], num_tokens: int, end: bytes
) -> None:
    silent_after = num_tokens if fault["kind"] == "silence" else None
    async with serving(drilled(**fault)) as session:
        got = await sent_before_the_end(session, silent_after=silent_after)

    assert got.count(TOKEN) == num_tokens
    assert got.endswith(end)


async def test_reset_may_take_back_what_was_not_read_yet() -> None:
    async with serving(drilled(kind="reset", after_tokens=5)) as session:
        got = await sent_before_the_end(session)

    assert got.count(TOKEN) <= 5
    assert got.endswith(b"ConnectionResetError")


@pytest.mark.parametrize("kind", ["silence", "reset", "garbage"])
async def test_no_answer_begins_under_a_fault_before_the_head(kind: str) -> None:
    async with serving(drilled(kind=kind)) as session:
        with pytest.raises((aiohttp.ClientError, TimeoutError)):
            async with asyncio.timeout(SILENCE_S):
                await ask(session, messages=MESSAGES)
        async with session.get("/health") as response:
            assert response.status == 200

        await session.post("/drill", json={"kind": kind, "everywhere": True})
        with pytest.raises((aiohttp.ClientError, TimeoutError)):
            async with asyncio.timeout(SILENCE_S):
                await session.get("/health")


async def test_fault_ends_when_the_next_is_set() -> None:
    async with serving(drilled(kind="status", status=503)) as session:
        error = await ask(session, expect=503, messages=MESSAGES)
        await session.post("/drill", json={"kind": "none"})
        answer = await ask(session, messages=MESSAGES, max_tokens=1)

    assert error["error"]["message"] == "simulated failure"
    assert answer["usage"]["completion_tokens"] == 1


async def test_slow_engine_takes_so_many_times_as_long() -> None:
    async def seconds(session: aiohttp.ClientSession) -> float:
        loop = asyncio.get_running_loop()
        since_s = loop.time()
        await ask(session, messages=MESSAGES, max_tokens=20, ignore_eos=True)
        return loop.time() - since_s

    async with serving(drilled(kind="none")) as session:
        fast_s = await seconds(session)
        await session.post("/drill", json={"kind": "slow", "slowdown": 100})
        assert await seconds(session) > max(fast_s, 0.19), "20 steps of 1 ms / 10 x 100"


async def test_departures_are_told_with_request_id_and_time() -> None:
    body = {"messages": MESSAGES, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    async with serving(drilled(kind="slow", slowdown=1000)) as session:
        headers = {"X-Request-Id": "leaver"}
        response = await session.post("/v1/chat/completions", json=body, headers=headers)
        response.close()
        await until(session, EngineLoad(running=0, waiting=0, kv_cache_usage=0.0))
        async with session.get("/drill") as told:
            page = await told.json()

    assert page["arrivals"] == ["leaver"]
    assert [departure["request_id"] for departure in page["departures"]] == ["leaver"]


async def test_there_is_no_drill_unless_the_engine_was_started_for_it() -> None:
    async with serving(settings()) as session, session.post("/drill", json={}) as response:
        assert response.status == 404


@pytest.mark.parametrize(
    "fault",
    [{"kind": "flood"}, {"kind": "garbage-event"}, {"kind": "status", "after_tokens": 1}, {"x": 1}],
)
async def test_impossible_fault_is_refused(fault: dict[str, Any]) -> None:
    async with serving(drilled(kind="none")) as session:
        error = await ask(session, "/drill", expect=400, **fault)

    assert "not a fault" in error["error"]["message"]


def test_engine_kills_itself_after_so_many_tokens() -> None:
    command = [sys.executable, "-m", "cluster.engines.sim_server", "--model", "chat", "--port=0"]
    fault = '{"kind": "kill", "after_tokens": 3}'

    async def ask_it(url: str) -> bytes:
        async with aiohttp.ClientSession(url) as session:
            return await sent_before_the_end(session)

    with subprocess.Popen(
        [*command, "--drill", fault], stdout=subprocess.PIPE, text=True
    ) as process:
        url = next(line.split()[-1] for line in process.stdout if "startup complete" in line)
        got = asyncio.run(ask_it(url))
        assert process.wait(60) == -9

    assert got.count(TOKEN) == 3


def test_fault_that_is_none_is_refused_at_the_start() -> None:
    command = [sys.executable, "-m", "cluster.engines.sim_server", "--model", "chat"]

    done = subprocess.run(
        [*command, "--drill", '{"kind": "flood"}'], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "is not a fault" in done.stderr
