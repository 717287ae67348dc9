from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from gateway.server import Gateway
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

HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@dataclass
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


@dataclass
class Wire:
    """A client that says exactly what it is told to."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)

    async def answer(self, *, to_head: bool = False) -> Answered:
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            line, *lines = head.decode().removesuffix("\r\n\r\n").split("\r\n")
            headers = dict(item.split(": ", 1) for item in lines)
            length = int(headers.get("content-length", "0"))
            body = b"" if to_head else await self.reader.readexactly(length)
            if headers.get("transfer-encoding") == "chunked":
                body = await self._chunks()
            return Answered(int(line.split()[1]), headers, body)

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
        return body

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()


@asynccontextmanager
async def a_wire(gateway: Gateway) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


def a_post(body: bytes | None = None, *headers: str, version: str = "1.1") -> bytes:
    body = json.dumps(a_chat()).encode() if body is None else body
    lines = [f"POST {CHAT} HTTP/{version}", "host: x", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def bytewise(data: bytes) -> Iterable[bytes]:
    return (data[n : n + 1] for n in range(len(data)))


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_wire(gateway) as wire,
    ):
        wire.send(a_post(None, "x-request-id: 1") + HEALTH + a_post(None, "x-request-id: 2"))
        await until(lambda: engine.running == 1)
        engine.gate.set()

        first, second, third = [await wire.answer() for _ in range(3)]

        assert (first.headers["x-request-id"], third.headers["x-request-id"]) == ("1", "2")
        assert json.loads(second.body) == {"status": "ok"}
        assert engine.most_running == 1


async def test_many_pipelined_requests_are_taken_a_few_at_a_time() -> None:
    async with a_gateway(a_table()) as gateway, a_wire(gateway) as wire:
        wire.send(HEALTH * 500)

        assert {(await wire.answer()).status for _ in range(500)} == {200}


async def test_a_request_sent_byte_by_byte_is_a_request() -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_wire(gateway) as wire,
    ):
        for piece in bytewise(a_post()):
            wire.send(piece)
            await asyncio.sleep(0)

        assert (await wire.answer()).status == 200
        assert engine.seen[0].json == a_chat()


async def test_a_chunked_body_reaches_the_engine_with_its_length() -> None:
    body = json.dumps(a_chat()).encode()
    chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (1, piece) for piece in bytewise(body))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_wire(gateway) as wire,
    ):
        wire.send(head + chunks + b"0\r\n\r\n")

        assert (await wire.answer()).status == 200
        assert engine.seen[0].body == body
        assert engine.seen[0].headers["content-length"] == str(len(body))
        assert "transfer-encoding" not in engine.seen[0].headers


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GARBAGE\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "malformed_request"),
        (a_post(b"{}", "transfer-encoding: chunked"), 400, "malformed_request"),
        (b"GET /" + b"a" * 9000, 414, "uri_too_long"),
        (HEALTH[:-2] + b"x: " + b"a" * 70000 + b"\r\n\r\n", 431, "headers_too_large"),
        (HEALTH[:-2] + b"x: a\r\n" * 200 + b"\r\n", 431, "headers_too_large"),
        (a_post(b"", "expect: tea"), 417, "expectation_failed"),
        (a_post(b"x" * 2000), 413, "request_too_large"),
    ],
)
async def test_what_is_refused_gets_an_error_body_and_the_end_of_the_connection(
    sent: bytes, status: int, code: str
) -> None:
    async with a_gateway(a_table(), limits={"max_body_bytes": 1000}) as gateway:
        async with a_wire(gateway) as wire:
            wire.send(HEALTH + sent)
            before, refused = await wire.answer(), await wire.answer()

            assert before.status == 200
            assert (refused.status, refused.error["code"]) == (status, code)
            assert refused.error["type"] == "invalid_request_error"
            assert refused.headers["connection"] == "close"
            assert refused.headers["x-request-id"]
            assert await wire.rest() == b""
        async with a_client(gateway) as client:
            name = "bora_gateway_requests_total"
            assert await metric(client, name, status=str(status)) == 1


async def test_a_refused_client_that_still_sends_can_read_why() -> None:
    async with (
        a_gateway(a_table(), limits={"max_body_bytes": 1000}) as gateway,
        a_wire(gateway) as wire,
    ):
        wire.send(a_post(b"x" * 8_000_000))

        assert (await wire.answer()).status == 413


async def test_http_1_0_gets_no_chunks_and_the_end_of_the_connection() -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_wire(gateway) as wire,
    ):
        wire.send(a_post(json.dumps(a_chat(stream=True)).encode(), version="1.0"))
        head, _, body = (await wire.rest()).partition(b"\r\n\r\n")

        assert b"transfer-encoding" not in head
        assert b"connection: close" in head
        assert body == b"".join(engine.stream_chunks(CHAT, {"model": "chat"}))


async def test_connection_close_is_obeyed_and_keep_alive_is_the_rule() -> None:
    async with a_gateway(a_table()) as gateway, a_wire(gateway) as wire:
        wire.send(HEALTH)
        assert "connection" not in (await wire.answer()).headers
        wire.send(HEALTH[:-2] + b"connection: close\r\n\r\n" + HEALTH)
        assert (await wire.answer()).headers["connection"] == "close"
        assert await wire.rest() == b""


async def test_head_is_get_without_a_body() -> None:
    async with a_gateway(a_table()) as gateway, a_wire(gateway) as wire:
        wire.send(HEALTH.replace(b"GET", b"HEAD") + HEALTH)
        head, whole = await wire.answer(to_head=True), await wire.answer()

        assert head.headers["content-length"] == str(len(whole.body))
        assert whole.status == 200


async def test_a_client_that_waits_for_100_continue_gets_it_in_its_turn() -> None:
    body = json.dumps(a_chat()).encode()
    waiting = a_post(body, "expect: 100-continue").removesuffix(body)
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
        a_wire(gateway) as wire,
    ):
        wire.send(a_post() + waiting)
        await until(lambda: engine.running == 1)
        engine.gate.set()
        assert (await wire.answer()).status == 200
        assert (await wire.answer()).status == 100
        wire.send(body)
        assert (await wire.answer()).status == 200


@pytest.mark.parametrize(
    ("sent", "limits", "status"),
    [
        (b"POST /v1/chat", {"header_timeout_s": 0.1}, 408),
        (HEALTH + b"GET", {"header_timeout_s": 0.1}, 408),
        (a_post()[:-3], {"body_timeout_s": 0.1}, 408),
        (b"", {"idle_timeout_s": 0.1}, None),
        (HEALTH, {"idle_timeout_s": 0.1}, None),
    ],
)
async def test_clients_that_dawdle_are_not_waited_for(
    sent: bytes, limits: dict[str, float], status: int | None
) -> None:
    async with a_gateway(a_table(), limits=limits) as gateway, a_wire(gateway) as wire:
        wire.send(sent)
        answer = await wire.rest()

        assert (b" 408 " in answer) == (status == 408)
        await until(lambda: gateway.num_connections == 0)


async def test_a_long_answer_is_no_idle_connection() -> None:
    limits = {"idle_timeout_s": 0.1, "header_timeout_s": 0.1, "body_timeout_s": 0.1}
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine)), limits=limits) as gateway,
        a_wire(gateway) as wire,
    ):
        wire.send(a_post(json.dumps(a_chat(stream=True)).encode()))
        await asyncio.sleep(0.4)
        engine.word_gate.set()

        assert (await wire.answer()).body.endswith(b"[DONE]\n\n")


async def test_a_client_that_does_not_read_pauses_the_engine_and_loses_nothing() -> None:
    flood = tuple(b'data: {"%c": "' % (65 + n % 26) + b"x" * 65000 + b'"}\n\n' for n in range(600))
    async with (
        an_engine(raw_chunks=flood) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port, limit=1024)
        writer.write(a_post(json.dumps(a_chat(stream=True)).encode()))
        wire = Wire(reader, writer)
        await until(lambda: gateway.num_unsent_bytes > 0)
        await asyncio.sleep(0.3)

        assert engine.running == 1  # it cannot get rid of it
        assert gateway.num_unsent_bytes < 2_000_000
        reader._limit = 2**20
        assert (await wire.answer()).body == b"".join(flood)
        await until(lambda: engine.running == 0)
        writer.transport.abort()


async def test_a_client_that_takes_nothing_at_all_is_hung_up_on() -> None:
    flood = tuple(b'data: {"x": "' + b"x" * 65000 + b'"}\n\n' for _ in range(600))
    async with (
        an_engine(raw_chunks=flood) as engine,
        a_gateway(a_table(an_endpoint(engine)), limits={"send_timeout_s": 0.2}) as gateway,
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port, limit=1024)
        writer.write(a_post(json.dumps(a_chat(stream=True)).encode()))

        await until(lambda: engine.hung_up_on == 1)
        await until(lambda: in_flight(gateway) == 0)
        writer.transport.abort()


async def test_a_client_that_leaves_stops_the_engine() -> None:
    async with (
        an_engine(word_gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
    ):
        async with a_wire(gateway) as wire:
            wire.send(a_post(json.dumps(a_chat(stream=True)).encode()))
            await wire.reader.readuntil(b"Hello")

        await until(lambda: engine.hung_up_on == 1)
        await until(lambda: in_flight(gateway) == 0)


async def test_connections_that_come_and_go_leave_nothing_behind() -> None:
    async with (
        an_engine(words=("a",) * 5) as engine,
        a_gateway(a_table(an_endpoint(engine))) as gateway,
    ):
        bodies = [json.dumps(a_chat(stream=stream)).encode() for stream in (True, False)]

        async def come_and_go(number: int) -> None:
            async with a_wire(gateway) as wire:
                request = a_post(bodies[number % 2])
                wire.send(request[: len(request) - number % 3 * 20])
                if number % 12 == 0:
                    await wire.reader.read(20)
                elif number % 4 == 1:
                    await asyncio.sleep(0)

        async def many() -> tuple[int, int]:
            for first in range(0, 300, 50):
                await asyncio.gather(*(come_and_go(n) for n in range(first, first + 50)))
            await until(lambda: gateway.num_connections == 0 and in_flight(gateway) == 0)
            await until(lambda: engine.running == 0)
            gc.collect()
            return len(asyncio.all_tasks()), len(gc.get_objects())

        await many()
        tasks, objects = await many()
        tasks_later, objects_later = await many()

        assert abs(tasks_later - tasks) < 20
        assert objects_later - objects < 300
