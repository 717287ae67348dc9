from __future__ import annotations

import asyncio
import io
import json
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
    metric,
)
from tests.gateway.test_http_server import a_post, a_wire

JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
WHOLE = JSON + b"content-length: 2\r\n\r\n{}"


@asynccontextmanager
async def a_raw_engine(
    *answers: bytes, then_close: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, list[int]]]:
    """Says `answers` in turn, the last one for ever; yields its URL, and its connections' requests."""
    asked: list[int] = []
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        mine = len(asked)
        asked.append(0)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                asked[mine] += 1
                writer.write(answers[min(sum(asked), len(answers)) - 1])
                await writer.drain()
                if then_close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    scheme = "https" if tls else "http"
    try:
        yield f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    "answer",
    [
        b"\x00\x01 garbage\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        JSON + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        JSON + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 300_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nx",
    ],
)
async def test_an_engine_that_does_not_speak_http_is_502(answer: bytes) -> None:
    async with (
        a_raw_engine(answer) as (url, _),
        a_gateway(a_table(an_endpoint(url))) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat())

        assert response.status == 502
        assert (await response.json())["error"]["code"] == "engine_failed"
        assert in_flight(gateway) == 0


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (JSON + b"\r\n{}", b"{}"),
        (b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nabc", b"abc"),
    ],
)
async def test_an_answer_without_a_length_ends_with_its_connection(
    answer: bytes, body: bytes
) -> None:
    async with (
        a_raw_engine(answer, then_close=True) as (url, _),
        a_gateway(a_table(an_endpoint(url))) as gateway,
        a_client(gateway) as client,
    ):
        for _ in range(2):
            response = await client.post(CHAT, json=a_chat())
            assert (response.status, await response.read()) == (200, body)


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_an_answer_without_a_body_leaves_nothing_on_the_connection(status: bytes) -> None:
    async with (
        a_raw_engine(b"HTTP/1.1 " + status + b"\r\n\r\n", WHOLE) as (url, _),
        a_gateway(a_table(an_endpoint(url))) as gateway,
        a_wire(gateway) as wire,
    ):
        wire.send(a_post(), a_post())
        first, second = await wire.answer(), await wire.answer()

        assert f"{first.status}".encode() in status
        assert "transfer-encoding" not in first.headers
        assert (second.status, second.body) == (200, b"{}")


async def test_an_answer_cut_short_is_502() -> None:
    answer = JSON + b"content-length: 10\r\n\r\n{}"
    async with (
        a_raw_engine(answer, then_close=True) as (url, _),
        a_gateway(a_table(an_endpoint(url))) as gateway,
        a_client(gateway) as client,
    ):
        assert (await client.post(CHAT, json=a_chat())).status == 502


async def test_interim_answers_are_skipped() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    async with (
        a_raw_engine(interim + WHOLE) as (url, _),
        a_gateway(a_table(an_endpoint(url))) as gateway,
        a_client(gateway) as client,
    ):
        response = await client.post(CHAT, json=a_chat())

        assert (response.status, await response.read()) == (200, b"{}")
        assert "link" not in response.headers


@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", b"x"])
async def test_bytes_that_nobody_asked_for_reach_nobody(extra: bytes) -> None:
    async with (
        a_raw_engine(WHOLE + extra, WHOLE) as (url, asked),
        a_gateway(a_table(an_endpoint(url))) as gateway,
        a_client(gateway) as client,
    ):
        for _ in range(3):
            response = await client.post(CHAT, json=a_chat())
            assert (response.status, await response.read()) == (200, b"{}")
        assert asked == [1, 2]  # the first connection was not used again


async def test_connections_are_kept_and_closed_when_the_engine_says_so() -> None:
    closing = WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    async with (
        a_raw_engine(WHOLE, closing, WHOLE) as (url, asked),
        a_gateway(a_table(an_endpoint(url))) as gateway,
        a_client(gateway) as client,
    ):
        for _ in range(4):
            await (await client.post(CHAT, json=a_chat())).read()
        assert asked == [2, 2]


async def test_headers_of_one_hop_stay_there() -> None:
    hop = b"keep-alive: timeout=5\r\nserver: uvicorn\r\nx-bora-variant: fake\r\ndate: x\r\nx-own: y\r\n"
    async with (
        a_raw_engine(WHOLE.replace(b"\r\n\r\n", b"\r\n" + hop + b"\r\n")) as (url, _),
        a_gateway(a_table(an_endpoint(url, variant="v"))) as gateway,
        a_client(gateway) as client,
    ):
        headers = (await client.post(CHAT, json=a_chat())).headers

        assert headers.getall("x-bora-variant") == ["v"]
        assert headers["x-own"] == "y"
        assert "keep-alive" not in headers
        assert "server" not in headers


async def test_a_large_body_gets_through_both_ways() -> None:
    text = "x" * 5_000_000
    async with (
        an_engine(words=(text,)) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_client(gateway) as client,
    ):
        body = a_chat(image=text)
        sent = io.BytesIO(json.dumps(body).encode())
        answer = await (await client.post(CHAT, data=sent)).json()

        assert engine.seen[0].json == body
        assert answer["choices"][0]["message"]["content"] == text


def a_certificate(certificate: Path, key: Path) -> ssl.SSLContext:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    return tls


async def test_an_engine_behind_https_is_reached_if_its_certificate_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "cert.pem"
    tls = a_certificate(certificate, tmp_path / "key.pem")
    async with a_raw_engine(WHOLE, tls=tls) as (url, asked):
        async with a_gateway(a_table(an_endpoint(url))) as gateway, a_client(gateway) as client:
            response = await client.post(CHAT, json=a_chat())
            assert response.status == 503
            assert "certificate" in (await response.json())["error"]["message"]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with a_gateway(a_table(an_endpoint(url))) as gateway, a_client(gateway) as client:
            for _ in range(2):
                assert (await client.post(CHAT, json=a_chat())).status == 200
            assert await metric(client, "bora_gateway_retries_total") == 0
        assert sum(asked) == 2


async def test_what_the_client_calls_a_model_is_found_wherever_it_stands_in_the_body() -> None:
    bodies = [
        '{"messages": [{"model": "no"}], "model": "chat"}',
        '{"model": "no", "model": "chat"}',
        '{"mod\\u0065l": "ch\\u0061t"}',
        '{"model": "chat", "x": NaN, "y": "\\ud800"}',
        '{"model": "chat", "x": {"model": ["no"]}, "y": "\\"model\\": \\"no\\""}',
    ]
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine, served_model_name="weights"))) as gateway,
        a_client(gateway) as client,
    ):
        for body in bodies:
            assert (await client.post(CHAT, data=body)).status == 200

    assert [seen.json for seen in engine.seen] == [
        {**json.loads(body), "model": "weights"} for body in bodies
    ]
