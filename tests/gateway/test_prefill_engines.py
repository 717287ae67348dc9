"""Simulated engines that hand KV caches on, behind a gateway: what clients get is always the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import pytest

from cluster.engines.sim_transfer import Transfer, TransferConfig
from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from gateway.server import Gateway
from tests.gateway.engines import CHAT, a_client, a_gateway, a_table, an_endpoint, in_flight, metric
from tests.gateway.test_migration import COMPLETIONS, Sim, a_request, a_sim, events_of

HANDS_ON = Transfer(
    TransferConfig(
        kv_connector="NixlConnector", kv_role="kv_both", kv_load_failure_policy="recompute"
    )
)
PROMPT = "The bora falls from the plateau to the sea. " * 60
SLOW_TOKENS_PER_S = 0.5  # one token is soon read, but not a prompt


@dataclass
class Pools:
    """Engines that read, engines that answer, one that does both, and a gateway before the first two."""

    readers: list[Sim]
    writers: list[Sim]
    whole: Sim
    gateway: Gateway
    client: aiohttp.ClientSession

    async def prefills(self, outcome: str) -> float:
        name = "bora_gateway_prefill_duration_seconds_count"
        return await metric(self.client, name, outcome=outcome)


@asynccontextmanager
async def pools(
    *, num_readers: int = 1, num_writers: int = 1, writer_tokens_per_s: float = 10_000.0
) -> AsyncIterator[Pools]:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        readers = [await enter(a_sim(transfer=HANDS_ON)) for _ in range(num_readers)]
        writers = [
            await enter(a_sim(transfer=HANDS_ON, prefill_tokens_per_s=writer_tokens_per_s))
            for _ in range(num_writers)
        ]
        endpoints = [
            *(an_endpoint(sim.url, role="prefill", engine="sim") for sim in readers),
            *(an_endpoint(sim.url, role="decode", engine="sim") for sim in writers),
        ]
        limits = {"prefill_min_tokens": 16, "suspect_s": 0.01, "max_migrations": 1000}
        gateway = await enter(a_gateway(a_table(*endpoints), limits=limits, grpc_port=0))
        client = await enter(a_client(gateway))
        yield Pools(readers, writers, await enter(a_sim()), gateway, client)


def a_long_request(path: str, **changes: Any) -> dict[str, Any]:
    asked = (
        {"messages": [{"role": "user", "content": PROMPT}]} if path == CHAT else {"prompt": PROMPT}
    )
    return a_request(path, **{**asked, **changes})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_answer_is_the_one_of_an_engine_that_does_all_the_work(path: str) -> None:
    async with pools(writer_tokens_per_s=SLOW_TOKENS_PER_S) as all_:
        asked = a_long_request(path)
        expected = await events_of(all_.whole.session, path, asked)

        assert await events_of(all_.client, path, asked) == expected
        whole = a_long_request(path, stream=False, stream_options=None)
        async with all_.client.post(path, json=whole) as response:
            choice = (await response.json())["choices"][0]
        async with all_.whole.session.post(path, json=whole) as response:
            assert (await response.json())["choices"][0] == choice
        assert in_flight(all_.gateway) == 0


async def test_it_is_the_same_over_grpc() -> None:
    async with pools(writer_tokens_per_s=SLOW_TOKENS_PER_S) as all_:
        messages = [pb.ChatMessage(role="user", content=PROMPT)]
        request = pb.ChatCompletionRequest(model="chat", messages=messages, max_tokens=8)
        target = f"127.0.0.1:{all_.gateway.grpc_port}"
        async with grpc.aio.insecure_channel(target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            whole = await stub.ChatCompletion(request)
            parts = [part async for part in stub.ChatCompletionStream(request)]

        text = "".join(part.choices[0].delta.content for part in parts if part.choices)
        assert whole.choices[0].message.content == text != ""
        assert await all_.prefills("handed_over") == 2


async def test_a_lost_prefill_engine_is_not_noticed() -> None:
    async with pools() as all_:
        expected = await events_of(all_.whole.session, CHAT, a_long_request(CHAT))
        for fault in ("reset", "garbage", "status"):
            await all_.readers[0].fail(kind=fault)
            asked = a_long_request(CHAT, user=fault)
            assert await events_of(all_.client, CHAT, asked) == expected

        assert await all_.prefills("handed_over") == 0
        assert in_flight(all_.gateway) == 0


@pytest.mark.parametrize("kind", ["reset", "garbage-event"])
async def test_a_stream_moves_between_engines_that_answer(kind: str) -> None:
    async with pools(num_writers=2) as all_:
        expected = await events_of(all_.whole.session, CHAT, a_long_request(CHAT))
        for number in (1, 5, 20):
            for writer in all_.writers:
                await writer.fail(kind=kind, after_tokens=number)
            task = asyncio.create_task(events_of(all_.client, CHAT, a_long_request(CHAT)))
            await asyncio.sleep(0.03)
            for writer in all_.writers:
                await writer.fail(kind="none")

            assert await task == expected
        assert in_flight(all_.gateway) == 0


async def test_many_at_once_are_all_right() -> None:
    async with pools(num_readers=2, num_writers=2) as all_:
        bodies = [a_long_request(CHAT, messages=_messages(n)) for n in range(24)]
        answers = await asyncio.gather(*(events_of(all_.client, CHAT, body) for body in bodies))

        for body, answer in zip(bodies[::6], answers[::6], strict=True):
            assert await events_of(all_.whole.session, CHAT, body) == answer
        assert await all_.prefills("handed_over") >= 1
        assert in_flight(all_.gateway) == 0
        snapshot = all_.gateway.admission.router.snapshot(0.0)
        assert [each.tokens_in_flight for each in snapshot] == [0] * 4


def _messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{number}: {PROMPT}"}]
