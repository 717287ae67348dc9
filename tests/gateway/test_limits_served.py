"""Limits and budgets of tenants, held by gateways with real sockets."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp
import grpc
import pytest

from gateway.endpoints import ServedModel
from gateway.proto import inference_pb2 as pb
from gateway.proto import inference_pb2_grpc
from tests.gateway.engines import (
    CHAT,
    PATIENCE_S,
    USAGE,
    a_chat,
    a_client,
    a_table,
    an_endpoint,
    an_engine,
    until,
)
from tests.gateway.tenants import (
    a_locked_gateway,
    a_tenant,
    bearer,
    known_spent,
    stored,
    write_keys,
)
from tests.gateway.test_server import a_process, ports


async def refusal(client: aiohttp.ClientSession) -> tuple[int, str, str]:
    async with client.post(CHAT, json=a_chat(), headers=bearer()) as response:
        error = (await response.json())["error"]
        return response.status, error["code"], response.headers["retry-after"]


async def test_what_exceeds_a_limit_is_429_by_http_and_grpc(tmp_path: Path) -> None:
    async with (
        an_engine() as engine,
        a_locked_gateway(
            tmp_path, a_table(an_endpoint(engine)), a_tenant(requests_per_minute=1), grpc_port=0
        ) as gateway,
        a_client(gateway) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel,
    ):
        assert (await client.post(CHAT, json=a_chat(), headers=bearer())).status == 200
        status, code, retry_after = await refusal(client)
        assert (status, code) == (429, "rate_limit_exceeded")
        assert 58 <= int(retry_after) <= 60
        request = pb.ChatCompletionRequest(
            model="chat", messages=[pb.ChatMessage(role="user", content="hi")]
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await inference_pb2_grpc.InferenceStub(channel).ChatCompletion(
                request, metadata=list(bearer().items())
            )
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(refused.value.trailing_metadata())
        assert trailing["x-ratelimit-limit-requests"] == "1"
        assert 58 <= int(trailing["retry-after"]) <= 60
    assert len(engine.seen) == 1


async def test_a_spent_budget_outlives_the_gateway_and_can_be_raised(tmp_path: Path) -> None:
    tenant = a_tenant(budget_tokens=12)  # an answer is 10
    async with an_engine() as engine:
        table = a_table(an_endpoint(engine))
        async with (
            a_locked_gateway(tmp_path, table, tenant) as gateway,
            a_client(gateway) as client,
        ):
            for status in (200, 200, 429):
                response = await client.post(CHAT, json=a_chat(), headers=bearer())
                assert response.status == status
        async with (
            a_locked_gateway(tmp_path, table, tenant) as gateway,
            a_client(gateway) as client,
        ):
            assert (await refusal(client))[:2] == (429, "insufficient_quota")

            write_keys(tmp_path / "keys.yaml", a_tenant(budget_tokens=100))
            await until(lambda: gateway.access.ring.tenants["acme"].budget_tokens == 100)

            assert (await client.post(CHAT, json=a_chat(), headers=bearer())).status == 200


async def test_gateways_with_one_key_file_hold_a_budget_together(tmp_path: Path) -> None:
    tenant = a_tenant(budget_tokens=12)
    async with an_engine() as engine:
        table = a_table(an_endpoint(engine))
        async with (
            a_locked_gateway(tmp_path, table, tenant) as one,
            a_locked_gateway(tmp_path, table, tenant) as two,
            a_client(one) as to_one,
            a_client(two) as to_two,
        ):
            assert (await to_two.post(CHAT, json=a_chat(), headers=bearer())).status == 200
            assert (await to_one.post(CHAT, json=a_chat(), headers=bearer())).status == 200
            # Written by the one, and read by the other.
            await until(lambda: {known_spent(one), known_spent(two)} == {20})

            for client in (to_one, to_two):
                assert (await refusal(client))[1] == "insufficient_quota"


async def test_workers_of_one_gateway_hold_limits_and_write_usage_together(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", a_tenant(requests_per_minute=4))
    async with (
        an_engine() as engine,
        a_process(tmp_path, engine.url, "--workers", "2", "--keys", str(keys)) as (process, log),
    ):
        await until(lambda: len(ports(log)) == 2)
        base = f"http://127.0.0.1:{ports(log)[0][0]}"
        connector = aiohttp.TCPConnector(force_close=True)  # so that both workers are asked
        async with aiohttp.ClientSession(base, connector=connector) as client:
            statuses = []
            for _ in range(16):
                async with client.post(CHAT, json=a_chat(), headers=bearer()) as response:
                    statuses.append(response.status)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0

    assert sorted(statuses) == [200] * 4 + [429] * 12
    assert stored(tmp_path, "requests", "prompt_tokens") == [(4, 4 * USAGE["prompt_tokens"])]
    assert "Traceback" not in "".join(log)


async def test_a_limit_is_not_evaded_and_a_ban_not_lifted_by_another_models_help(
    tmp_path: Path,
) -> None:
    async with an_engine() as small, an_engine() as large:
        table = a_table(
            an_endpoint("http://127.0.0.1:9", model="gone"),
            an_endpoint(small, model="small"),
            an_endpoint(large, model="large"),
            models=(
                ServedModel(name="gone", fallback=("large", "small")),
                ServedModel(name="small", fallback=("large",)),
                ServedModel(name="large"),
            ),
        )
        tenant = a_tenant(models=("gone", "small"), requests_per_minute=2)
        async with (
            a_locked_gateway(tmp_path, table, tenant) as gateway,
            a_client(gateway) as client,
        ):
            for model, status in (("gone", 200), ("small", 200), ("small", 429), ("gone", 429)):
                body = a_chat(model=model)
                response = await client.post(CHAT, json=body, headers=bearer())
                assert response.status == status
    assert large.seen == []
    assert stored(tmp_path, "model", "requests") == [("small", 2)]


async def test_who_cannot_be_served_in_its_time_is_told_at_once(tmp_path: Path) -> None:
    async with (
        an_engine(gate=asyncio.Event()) as engine,
        a_locked_gateway(
            tmp_path, a_table(an_endpoint(engine, max_in_flight=1)), a_tenant()
        ) as gateway,
        a_client(gateway) as client,
    ):
        first = asyncio.ensure_future(client.post(CHAT, json=a_chat(), headers=bearer()))
        await until(lambda: engine.running == 1)
        await asyncio.sleep(0.3)
        second = asyncio.ensure_future(client.post(CHAT, json=a_chat(), headers=bearer()))
        await until(lambda: gateway.admission.queued("chat") == 1)
        engine.gate.set()
        await first
        await second
        engine.gate.clear()
        held = asyncio.ensure_future(client.post(CHAT, json=a_chat(), headers=bearer()))
        await until(lambda: engine.running == 1)

        hurried = {**bearer(), "x-request-timeout-s": "0.05"}
        async with client.post(CHAT, json=a_chat(), headers=hurried) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "deadline_out_of_reach"
            assert response.headers["retry-after"] == "1"
        engine.gate.set()
        assert (await held).status == 200
