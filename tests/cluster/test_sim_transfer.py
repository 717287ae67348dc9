"""Simulated engines hand KV caches on in vLLM's form; whoever lost one reads the prompt."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, Literal

import aiohttp
import pytest

from cluster.engines.sim import SimEngine
from cluster.engines.sim_options import parse_options
from cluster.engines.sim_settings import Settings, settings_of
from cluster.engines.sim_transfer import Transfer, TransferConfig
from tests.builders import a_shape, a_variant
from tests.cluster.test_sim_server import ask, serving, settings

PROMPT = "The bora falls from the plateau. " * 60
READ = {"do_remote_decode": True, "do_remote_prefill": False}
CONFIG = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_load_failure_policy":"recompute"}'
SLOW_TOKENS_PER_S = 0.5  # one token is soon read, but not a prompt


def handing_on(
    policy: Literal["recompute", "fail"] = "recompute", *, reads: bool = True, lease_s: float = 30.0
) -> Settings:
    config = TransferConfig(
        kv_connector="NixlConnector", kv_role="kv_both", kv_load_failure_policy=policy
    )
    base = settings()
    timing = base.timing if reads else replace(base.timing, prefill_tokens_per_s=SLOW_TOKENS_PER_S)
    return replace(base, timing=timing, transfer=Transfer(config, lease_s=lease_s))


async def complete(session: aiohttp.ClientSession, **body: Any) -> Any:
    body = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, **body}
    return await ask(session, "/v1/completions", **body)


async def read(session: aiohttp.ClientSession) -> Any:
    answer = await complete(session, max_tokens=1, kv_transfer_params=READ)
    return answer["kv_transfer_params"]


async def kv_cache_usage(session: aiohttp.ClientSession) -> float:
    async with session.get("/metrics") as response:
        return SimEngine().load(await response.text()).kv_cache_usage


async def test_an_engine_says_where_it_keeps_a_cache_in_the_form_of_vllm() -> None:
    async with serving(handing_on()) as session:
        params = await read(session)
        other = await read(session)

    tokens = params["remote_num_tokens"]
    assert tokens > 100
    assert (params["do_remote_prefill"], params["do_remote_decode"]) == (True, False)
    [blocks] = params["remote_block_ids"]
    assert len(blocks) == -(-tokens // 16)
    assert params["remote_host"] == "127.0.0.1"
    assert params["remote_port"] == other["remote_port"] > 0
    assert params["remote_engine_id"] == other["remote_engine_id"]
    assert params["remote_request_id"] != other["remote_request_id"]
    assert (params["tp_size"], params["pp_size"], params["dcp_size"]) == (1, 1, 1)
    assert params["transfer_mode"] == "pull"


async def test_an_engine_that_fetches_the_cache_reads_nothing_and_says_the_same() -> None:
    async with (
        serving(settings()) as whole,
        serving(handing_on()) as reader,
        serving(handing_on(reads=False)) as writer,
    ):
        expected = (await complete(whole))["choices"]
        params = await read(reader)
        assert await kv_cache_usage(reader) > 0

        answer = await complete(writer, kv_transfer_params=params)

        assert answer["choices"] == expected
        assert answer["kv_transfer_params"] is None
        assert await kv_cache_usage(reader) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"remote_request_id": "chatcmpl-another"},
        {"remote_engine_id": "another"},
        {"remote_port": 9},
        {"remote_host": None},
        {"do_remote_prefill": False},
    ],
    ids=str,
)
async def test_an_engine_that_cannot_fetch_the_cache_reads_the_prompt(
    changes: dict[str, Any],
) -> None:
    async with serving(handing_on()) as reader, serving(handing_on()) as writer:
        expected = (await complete(writer))["choices"]
        params = {**await read(reader), **changes}

        assert (await complete(writer, kv_transfer_params=params))["choices"] == expected


async def test_a_cache_is_fetched_once() -> None:
    async with serving(handing_on()) as reader, serving(handing_on("fail")) as writer:
        params = await read(reader)
        await complete(writer, kv_transfer_params=params)

        error = await ask(
            writer, "/v1/completions", expect=500, prompt=PROMPT, kv_transfer_params=params
        )

    assert error["error"]["type"] == "InternalServerError"


async def test_what_nobody_fetches_is_let_go() -> None:
    async with serving(handing_on(lease_s=0.01)) as reader:
        await read(reader)
        async with asyncio.timeout(60):
            while await kv_cache_usage(reader):
                await asyncio.sleep(0.01)


async def test_an_engine_without_the_flag_takes_no_notice_of_params() -> None:
    async with serving(settings()) as session:
        answer = await complete(session, kv_transfer_params=READ)

    assert answer["kv_transfer_params"] is None


def test_the_flag_is_vllms_and_the_address_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flag = f"--kv-transfer-config={CONFIG}"
    shape = a_shape(engine="sim", engine_args=("--dtype", "bfloat16", flag))
    variant = a_variant(role="prefill", shape=shape)
    launch = SimEngine().launch(variant, checkpoint="x", host="10.0.0.7", port=4000, api_key="k")
    for name, value in launch.env.items():
        monkeypatch.setenv(name, value)

    made = settings_of(parse_options(launch.command[3:]), "k")

    assert made.transfer is not None
    assert (made.transfer.host, made.transfer.port) == ("10.0.0.7", 4001)
    assert made.transfer.config == TransferConfig.model_validate_json(CONFIG)
    assert made.transfer.tokens_per_s == pytest.approx(12.5e9 / shape.kv_bytes_per_token, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"kv_connector": "OtherConnector", "kv_role": "kv_both"}, "kv_connector"),
        ({"kv_connector": "NixlConnector", "kv_role": "both"}, "kv_role"),
        ({"kv_connector": "NixlConnector"}, "kv_role"),
    ],
)
def test_a_config_that_vllm_would_refuse_is_refused(
    config: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--model", "chat", "--kv-transfer-config", json.dumps(config)])

    assert told in capsys.readouterr().err
