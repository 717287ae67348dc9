from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest

from gateway.errors import GatewayError, StartupFailed
from gateway.ports import free_ports, free_ports_in_a_row, hold_port
from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from gateway.server import run
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
    until,
)

LISTENS = re.compile(r"listens on [^:]+: HTTP (\d+), gRPC (\w+)")


async def test_draining_lets_streams_finish_and_refuses_the_rest() -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat(stream=True))
        draining = asyncio.create_task(gateway.drain(1000))
        await asyncio.sleep(0.01)

        for refused in (await client.post(CHAT, json=a_chat()), await client.get("/ready")):
            assert refused.status == 503
            assert refused.headers["retry-after"] == "1"
        assert (await client.get("/health")).status == 200
        assert not draining.done()

        engine.word_gate.set()
        assert (await response.read()).endswith(b"[DONE]\n\n")
        await asyncio.wait_for(draining, PATIENCE_S)


async def test_an_answer_that_a_drain_has_waited_for_is_its_connections_last() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        answer = asyncio.create_task(client.post(CHAT, json=a_chat()))
        await until(lambda: engine.running == 1)
        draining = asyncio.create_task(gateway.drain(1000))
        await asyncio.sleep(0.01)
        engine.gate.set()

        response = await answer
        assert (response.status, response.headers["connection"]) == (200, "close")
        await asyncio.wait_for(draining, PATIENCE_S)


async def test_what_still_runs_at_the_drain_deadline_is_ended_with_an_error() -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine, max_in_flight=1))) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat(stream=True))
        queued = asyncio.create_task(client.post(CHAT, json=a_chat()))
        await until(lambda: gateway.admission.queued("chat") == 1)

        await gateway.drain(0.1)

        last = (await response.read()).split(b"\n\n")[-2]
        assert "shutting down" in json.loads(last[6:])["error"]["message"]
        assert (await queued).status == 503
        await until(lambda: engine.hung_up_on == 1)
        assert in_flight(gateway) == 0


def test_free_ports_are_distinct_and_can_be_listened_on() -> None:
    found = free_ports(50)

    assert len(set(found)) == 50
    for port in found:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_free_port_is_given_again_only_when_none_is_left() -> None:
    first = free_ports_in_a_row(2)
    two = range(first, first + 2)

    assert {*free_ports(1, among=two), *free_ports(1, among=two)} == set(two)
    assert free_ports(1, among=two)[0] in two


@pytest.mark.parametrize("which", ["http_port", "grpc_port"])
async def test_a_port_in_use_is_said_clearly(which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupFailed, match=f"cannot listen on 127.0.0.1:{port}.*in use"):
            async with a_gateway(**{which: port}):
                pass


def test_a_port_held_by_another_gateways_workers_is_in_use() -> None:
    with hold_port("127.0.0.1", 0) as held:
        held.listen()
        with pytest.raises(StartupFailed, match="in use"):
            hold_port("127.0.0.1", held.getsockname()[1])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "one of the two"),
        ({"controller": "ftp://x"}, "controller_url"),
        ({"controller": "http://x", "endpoints": Path("y")}, "one of the two"),
        ({"controller": "http://x", "http_port": 70000}, "http_port"),
        ({"controller": "http://x", "workers": 0}, "workers"),
        ({"controller": "http://x", "token_file": Path("/nope")}, "/nope"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(StartupFailed, match=told) as refused:
        run(**settings)

    assert refused.value.exit_code == 2


def test_errors_know_their_statuses() -> None:
    error = GatewayError("x", retry_after_s=0.2)

    assert (error.status, error.exit_code, error.retry_after) == (500, 1, "1")


@asynccontextmanager
async def a_process(
    folder: Path, url: str, *options: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[str]]]:
    """`python -m gateway`; yields the process, its ports and its log so far."""
    path = folder / "endpoints.yaml"
    path.write_text(f'endpoints: [{{model: chat, url: "{url}"}}]')
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "--endpoints", str(path)),
        *("--http-port", "0", "--grpc-port", "0", *options),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "error::ResourceWarning"},
    )
    log: list[str] = []

    async def follow() -> None:
        while line := await process.stderr.readline():
            log.append(line.decode())

    following = asyncio.create_task(follow())
    try:
        yield process, log
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await following


def ports(log: list[str]) -> list[tuple[str, str]]:
    return LISTENS.findall("".join(log))


async def test_sigterm_drains_the_process_and_it_ends_well(tmp_path: Path) -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_process(tmp_path, engine.url) as (process, log),
    ):
        await until(lambda: ports(log) != [])
        base = f"http://127.0.0.1:{ports(log)[0][0]}"
        async with aiohttp.ClientSession(base) as client:
            response = await client.post(CHAT, json=a_chat(stream=True))
            process.send_signal(signal.SIGTERM)
            await until(lambda: "draining" in "".join(log))
            assert (await client.post(CHAT, json=a_chat())).status == 503
            engine.word_gate.set()
            assert (await response.read()).endswith(b"[DONE]\n\n")
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0

    access = [json.loads(line) for line in log if line.startswith("{")]
    assert sorted(line["status"] for line in access) == [200, 503]
    assert "Traceback" not in "".join(log)


async def test_sigterm_lets_grpc_streams_finish_and_refuses_new_calls(tmp_path: Path) -> None:
    request = pb.CompletionRequest(model="chat", prompt="Say")
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_process(tmp_path, engine.url) as (process, log),
    ):
        await until(lambda: ports(log) != [])
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports(log)[0][1]}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            stream = stub.CompletionStream(request)
            words = [(await stream.read()).choices[0].text]
            process.send_signal(signal.SIGTERM)
            await until(lambda: "draining" in "".join(log))
            refused = stub.Completion(request)
            assert await refused.code() == grpc.StatusCode.UNAVAILABLE
            assert dict(await refused.trailing_metadata())["retry-after"] == "1"
            engine.word_gate.set()
            while (chunk := await stream.read()) is not grpc.aio.EOF:
                words.append(chunk.choices[0].text)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0

    assert "".join(words) == "Hello big world"
    assert "Traceback" not in "".join(log)


async def test_workers_share_a_port_and_their_metrics_and_end_together(tmp_path: Path) -> None:
    async with (
        an_engine() as engine,
        a_process(tmp_path, engine.url, "--workers", "2") as (process, log),
    ):
        await until(lambda: len(ports(log)) == 2)
        assert len(set(ports(log))) == 1
        base = f"http://127.0.0.1:{ports(log)[0][0]}"
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(base, connector=connector) as client:
            for _ in range(12):
                assert (await client.post(CHAT, json=a_chat())).status == 200
            async with asyncio.timeout(30):  # each worker tells the others once a second
                while await metric(client, "bora_gateway_requests_total", status="200") != 12:
                    await asyncio.sleep(0.1)
            assert await metric(client, "bora_gateway_in_flight") == 0
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
    assert "Traceback" not in "".join(log)


async def test_a_process_that_cannot_start_ends_with_2_and_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with a_process(tmp_path, "http://127.0.0.1:9", "--http-port", port) as (process, log):
            assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 2

    assert [line for line in log if line.startswith("error: cannot listen on")]
    assert "Traceback" not in "".join(log)
