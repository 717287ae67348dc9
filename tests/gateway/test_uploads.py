"""Bodies that arrive slowly, from many clients at once: their sum is bounded, and the small ones pass."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from gateway.server import Gateway
from tests.gateway.engines import (
    CHAT,
    a_chat,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    metric,
    until,
)
from tests.gateway.test_http_server import Wire, a_post, a_wire

LIMITS = {"max_arriving_bytes": 1_000_000, "max_body_bytes": 600_000}


def a_body(num_bytes: int) -> bytes:
    filler = "x" * (num_bytes - len(json.dumps(a_chat(user=""))))
    return json.dumps(a_chat(user=filler)).encode()


def in_chunks(body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    pieces = [body[start : start + 5000] for start in range(0, len(body), 5000)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@contextlib.asynccontextmanager
async def some_wires(gateway: Gateway, count: int) -> AsyncIterator[list[Wire]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(a_wire(gateway)) for _ in range(count)]


def arriving(gateway: Gateway) -> int:
    assert gateway._http is not None
    return gateway._http._shared.uploads._total


@pytest.mark.parametrize("form", [a_post, in_chunks])
async def test_of_too_many_slow_uploads_the_largest_is_refused_and_the_others_arrive(form) -> None:
    sizes = (350_000, 450_000, 400_000)
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine)), limits=LIMITS) as gateway,
        some_wires(gateway, len(sizes)) as wires,
        a_client(gateway) as client,
    ):
        requests = [form(a_body(size)) for size in sizes]
        for wire, request in zip(wires[:2], requests, strict=False):
            wire.send(request[:-1000])
        await until(lambda: arriving(gateway) > 790_000)
        wires[2].send(requests[2][:-1000])

        refused = await wires[1].answer()
        assert (refused.status, refused.error["code"]) == (503, "uploads_full")
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert (await client.post(CHAT, json=a_chat())).status == 200
        for number in (0, 2):
            wires[number].send(requests[number][-1000:])
            assert (await wires[number].answer()).status == 200
        assert [len(seen.body) for seen in engine.seen[1:]] == [sizes[0], sizes[2]]
        assert arriving(gateway) == 0
        assert await metric(client, "bora_gateway_requests_total", status="503") == 1


async def test_clients_that_leave_make_room() -> None:
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine)), limits=LIMITS) as gateway,
        a_wire(gateway) as wire,
    ):
        for _ in range(3):
            async with a_wire(gateway) as leaving:
                leaving.send(a_post(a_body(500_000))[:-1])
                await until(lambda: arriving(gateway) > 490_000)
            await until(lambda: arriving(gateway) == 0)
        wire.send(a_post(a_body(600_000)))

        assert (await wire.answer()).status == 200


async def test_what_waits_behind_a_slow_answer_counts_too() -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_gateway(a_table(an_endpoint(engine)), limits=LIMITS) as gateway,
        some_wires(gateway, 2) as (greedy, other),
    ):
        greedy.send(a_post() + 2 * a_post(a_body(350_000)))
        await until(lambda: engine.running == 1 and arriving(gateway) == 700_000)
        other.send(a_post(a_body(500_000)))
        await until(lambda: engine.running == 2)
        engine.gate.set()

        assert (await other.answer()).status == 200
        assert (await greedy.answer()).status == 200
        assert (await greedy.answer()).status == 503
        assert len(engine.seen) == 2


async def test_a_bound_below_one_body_still_lets_one_arrive() -> None:
    limits = {"max_arriving_bytes": 1000, "max_body_bytes": 500_000}
    async with (
        an_engine() as engine,
        a_gateway(a_table(an_endpoint(engine)), limits=limits) as gateway,
        a_wire(gateway) as wire,
    ):
        wire.send(a_post(a_body(400_000)))

        assert (await wire.answer()).status == 200
