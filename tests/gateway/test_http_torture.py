"""Hostile bytes on a connection: cut anywhere, broken off, too many, too large, with line breaks in them."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.gateway.engines import (
    a_chat,
    in_flight,
    until,
)
from tests.gateway.http_stand import (
    BODY,
    CHUNKED,
    LAST,
    LENGTH,
    PLAIN,
    START,
    Outcome,
    a_stand,
)

SPLIT = {
    "a length": PLAIN,
    "chunks with extensions and trailers": (
        CHUNKED
        + b"5;a=b\r\n%b\r\n%x\r\n%b\r\n0\r\nx: y\r\n\r\n" % (BODY[:5], len(BODY) - 5, BODY[5:])
    ),
    "several pipelined": LAST.replace(b"Connection: close\r\n", b"") + PLAIN,
}


@pytest.mark.parametrize("name", SPLIT)
async def test_a_request_cut_anywhere_is_the_same_request(name: str) -> None:
    data = SPLIT[name]
    async with a_stand() as stand:
        whole = await stand.outcome([data + LAST])
        assert whole.seen == 1
        assert whole.went_on
        for cut in range(1, len(data)):
            assert await stand.outcome([data[:cut], data[cut:] + LAST]) == whole
            assert stand.engine.seen[0].body == BODY


@pytest.mark.parametrize("name", SPLIT)
async def test_a_request_that_breaks_off_anywhere_reaches_nobody(name: str) -> None:
    data = SPLIT[name]
    async with a_stand() as stand:
        for cut in range(len(data)):
            _, connection = stand.connect()
            connection.data_received(data[:cut])
            connection.connection_lost(None)
        await asyncio.sleep(0.05)

        assert stand.engine.seen == []
        assert stand.gateway.num_connections == 0
        assert in_flight(stand.gateway) == 0


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n", 414),
        (START + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (START + b"X" * 70_000 + b": a\r\n\r\n", 431),
        (START + b"X: a\r\n" * 129 + b"\r\n", 431),
        (START + b"Content-Length: 5000001\r\n\r\n", 413),
        (CHUNKED + b"4c4b41\r\n" + b"a" * 5_000_001, 413),
        (CHUNKED + b"1;" + b"a" * 200_000, 431),
        (CHUNKED + b"0\r\nx: " + b"a" * 200_000, 431),
        (CHUNKED + b"0\r\n" + b"x: a\r\n" * 200, 431),
    ],
)
async def test_what_is_too_large_ends_the_connection(sent: bytes, status: int) -> None:
    async with a_stand(max_body_bytes=5_000_000) as stand:
        for size in (len(sent), 4096):
            pieces = [sent[at : at + size] for at in range(0, len(sent), size)]
            assert await stand.outcome(pieces) == Outcome([status], 0, went_on=False)


@pytest.mark.parametrize(
    "header",
    [
        b"x-request-id: a\r\n\tSet-Cookie: b",
        b"x-request-id: a\nSet-Cookie: b",
        b"x-request-id: a\rSet-Cookie: b",
        b"x-session-id: a\nX-Evil: b",
        b"traceparent: a\nX-Evil: b",
        b"x-request-timeout-s: 5\nX-Evil: b",
    ],
)
async def test_headers_with_line_breaks_are_refused(header: bytes) -> None:
    async with a_stand() as stand:
        sent = PLAIN.replace(b"Host: a", b"Host: a\r\n" + header)
        assert await stand.outcome([sent + LAST]) == Outcome([400], 0, went_on=False)


@pytest.mark.parametrize(
    "name", [b"x-request-id", b"x-session-id", b"traceparent", b"tracestate", b"anthropic-beta"]
)
@pytest.mark.parametrize("value", [b"\xc4\x8d\xc4\x8a", b"a\tb", b"\x85", b"<script>", b"a" * 9000])
async def test_odd_header_values_inject_nothing(name: bytes, value: bytes) -> None:
    async with a_stand() as stand:
        pipe, connection = stand.connect()
        connection.data_received(PLAIN.replace(b"Host: a", b"Host: a\r\n%b: %b" % (name, value)))
        await until(lambda: pipe.sent.endswith(b"}"))
        connection.connection_lost(None)

        [seen] = stand.engine.seen
        forwarded = seen.headers.get(name.decode(), "")
        assert forwarded.isascii()
        assert forwarded.isprintable()
        head = pipe.sent.partition(b"\r\n\r\n")[0]
        assert value not in head
        assert head.isascii()


@pytest.mark.parametrize(
    "name", ["chat\r\nX-Evil: 1", "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "\x00", "\u010a"]
)
async def test_model_names_inject_nothing(name: str) -> None:
    async with a_stand() as stand:
        body = json.dumps(a_chat(model=name)).encode()
        sent = START + b"Content-Length: %d\r\n\r\n" % len(body) + body
        pipe, connection = stand.connect()
        connection.data_received(sent)
        await until(lambda: pipe.sent.endswith(b"}"))
        connection.connection_lost(None)

        head, _, told = pipe.sent.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ")
        assert b"evil" not in head.lower()
        assert json.loads(told)["error"]["code"] == "model_not_found"


async def test_a_client_of_http_1_0_is_not_told_to_go_on() -> None:
    async with a_stand() as stand:
        pipe, connection = stand.connect()
        head = START.replace(b"/1.1", b"/1.0") + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n"
        connection.data_received(head)
        assert pipe.sent == b""
        connection.data_received(BODY)
        await until(lambda: pipe.closed)

        assert pipe.sent.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_thousands_of_requests_in_one_read_behind_a_slow_one_are_all_answered() -> None:
    async with a_stand() as stand:
        stand.engine.gate = asyncio.Event()
        pipe, connection = stand.connect()
        connection.data_received(PLAIN + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 3000 + LAST)
        await until(lambda: stand.engine.running == 1)

        stand.engine.gate.set()
        await until(lambda: pipe.closed)

        assert pipe.sent.count(b"HTTP/1.1 200 ") == 3002
        connection.connection_lost(None)


async def test_a_bug_behind_an_api_call_leaves_no_place_taken() -> None:
    async with a_stand() as stand:
        lanes = stand.gateway.admission._lanes
        stand.gateway.admission._lanes = {}
        pipe, connection = stand.connect()
        connection.data_received(PLAIN + LAST)
        stand.gateway.admission._lanes = lanes

        assert b"HTTP/1.1 500 " in pipe.sent
        forwarder = stand.gateway._forwarder
        assert forwarder is not None
        assert not forwarder._plant.running
        connection.connection_lost(None)
