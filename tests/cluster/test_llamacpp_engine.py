"""Real llama.cpp, as a replica starts it: it says what was planned, and what the model says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from cluster import nano
from cluster.checkpoints import locate
from cluster.engine_process import EngineProcess
from cluster.engines.llamacpp import LlamacppEngine
from cluster.errors import EngineFailed
from placement.catalogue import load_catalogue
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.plan import Variant
from placement.planner import make_plan
from tests.gateway.engines import CHAT, a_client, a_gateway, a_table, an_endpoint

pytestmark = pytest.mark.engine

PROMPT = "The wind that falls from the mountains"
SLOTS = 4


def planned(model: str = "nano-7b", precision: str = "fp16", **changes: Any) -> Variant:
    wish = FleetModel(
        name="chat",
        model=model,
        engine="llamacpp",
        precision=(precision,),
        max_model_len=2048,
        max_num_seqs=SLOTS,
        **changes,
    )
    pool = Pool(
        name="here", gpu="cpu", gpus_per_node=2, memory_gib_per_gpu=4, kv_cache_gib_per_gpu=1
    )
    fleet = FleetSpec(fleet="test", models=(wish,))
    [variant] = make_plan(fleet, Inventory(pools=(pool,)), load_catalogue()).variants
    return variant


def with_flags(variant: Variant, *flags: str) -> Variant:
    arguments = (*variant.shape.engine_args, *flags)
    shape = variant.shape.model_copy(update={"engine_args": arguments})
    return variant.model_copy(update={"shape": shape})


@asynccontextmanager
async def running(variant: Variant, folder: Path) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(LlamacppEngine(), variant, host="127.0.0.1", log=folder / "engine.log")
    try:
        await asyncio.wait_for(engine.start(locate(variant)), 300)
        yield engine
    finally:
        await asyncio.to_thread(engine.stop)


async def ask(engine: EngineProcess, path: str, body: dict[str, Any]) -> Any:
    headers = {"authorization": f"Bearer {engine.api_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(engine.url + path, json={"model": "chat", **body}) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.json()


@pytest.mark.parametrize("precision", ["fp16", "q8_0"])
@pytest.mark.parametrize("model", ["nano-7b", "nano-mixtral"])
async def test_memory_is_what_the_planner_predicts(tmp_path: Path, model: str, precision: str):
    variant = planned(model, precision)

    async with running(variant, tmp_path) as engine:
        assert engine.facts.kv_cache_tokens == variant.shape.kv_cache_tokens == SLOTS * 2048
        weights = variant.shape.per_gpu.weights_bytes
        assert engine.facts.weights_bytes == pytest.approx(weights, rel=0.01)


async def test_greedy_tokens_are_those_that_transformers_computes(tmp_path: Path):
    """The same weights by another implementation, from the safetensors file, in float32."""
    expected = greedy_tokens("nano-7b", PROMPT, count=24)

    async with running(planned("nano-7b", "fp16"), tmp_path) as engine:
        request = {"prompt": PROMPT, "n_predict": 24, "temperature": 0, "return_tokens": True}
        answer = await ask(engine, "/completion", request)

    assert len(set(expected)) > 8
    assert answer["tokens"] == expected


def greedy_tokens(name: str, prompt: str, *, count: int) -> list[int]:
    import torch  # noqa: PLC0415 - takes seconds
    from transformers import AutoTokenizer, MistralForCausalLM  # noqa: PLC0415

    folder = nano.ensure(name)
    model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    output = model.generate(start, max_new_tokens=count, do_sample=False)
    return [int(token) for token in np.asarray(output[0, start.shape[1] :])]


async def test_chat_and_load(tmp_path: Path):
    async with running(planned("nano-mixtral", "q8_0"), tmp_path) as engine:
        request = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1500}
        answers = [
            asyncio.create_task(ask(engine, "/v1/chat/completions", request)) for _ in range(6)
        ]
        most_running = most_waiting = 0
        most_used = 0.0
        while not all(task.done() for task in answers):
            assert await engine.observe()
            most_running = max(most_running, engine.load.running)
            most_waiting = max(most_waiting, engine.load.waiting)
            most_used = max(most_used, engine.load.kv_cache_usage)
            await asyncio.sleep(0.02)
        await engine.drained(10)
        texts = [task.result()["choices"][0]["message"]["content"] for task in answers]

    assert all(texts)
    assert (most_running, most_waiting) == (SLOTS, 2)
    assert 0.1 < most_used <= 1


async def test_speed_is_read_from_its_pages(tmp_path: Path):
    """Two answers one after the other to the same prompt, most of which is still in the cache."""
    async with running(planned("nano-7b", "q8_0"), tmp_path) as engine:
        assert await engine.observe()
        before, tasks = engine.load.counters, engine.load.tasks
        for _ in range(2):
            await ask(engine, "/completion", {"prompt": PROMPT * 9, "n_predict": 16})
        assert await engine.observe()
        after = engine.load.counters

    assert before is not None
    assert after is not None
    done = after.since(before)
    assert done is not None
    assert done.intervals == 32  # tokens, which the meter takes the first ones from
    assert done.prompt_tokens > 2 * 9 * len(PROMPT.split())
    assert 0.4 * done.prompt_tokens < done.cached_tokens < 0.5 * done.prompt_tokens
    assert done.ttft_s > 0
    assert done.intervals_s > 0
    assert len((engine.load.tasks or frozenset()) - (tasks or frozenset())) >= 1


async def test_a_request_has_the_context_that_was_planned_and_not_more(tmp_path: Path):
    async with running(planned(), tmp_path) as engine:
        answer = await ask(engine, "/v1/completions", {"prompt": "x", "temperature": 0})

        assert answer["usage"]["total_tokens"] == pytest.approx(2048, abs=2)


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


async def test_clients_of_a_gateway_see_what_vllm_would_show_them(tmp_path: Path) -> None:
    async with running(planned(), tmp_path) as engine:
        there = an_endpoint(engine.url, engine="llamacpp", api_key=engine.api_key)
        async with a_gateway(a_table(there)) as gateway, a_client(gateway) as client:

            async def told(path: str, **body: Any) -> tuple[int, Any]:
                async with client.post(path, json={"model": "chat", **body}) as response:
                    return response.status, await response.json()

            hello: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
            seeing = [{"role": "user", "content": [IMAGE]}]
            _, answer = await told("/v1/completions", prompt=PROMPT)
            _, counted = await told("/tokenize", prompt=PROMPT)
            _, chat = await told(CHAT, messages=hello, max_tokens=1)
            _, of_messages = await told("/tokenize", messages=hello)
            _, text = await told("/detokenize", tokens=counted["tokens"])
            mistakes = [
                await told(CHAT, messages=seeing),
                await told(CHAT, messages=[{"content": "no role"}]),
                await told(CHAT, messages=hello, tools=5),
                await told("/detokenize", tokens=[99999999]),
                await told("/v1/completions", prompt="x", repeat_last_n=2_000_000_000),
            ]
            unable, _ = await told("/v1/embeddings", input="x")

    assert answer["usage"]["completion_tokens"] == 16
    assert counted["count"] == len(counted["tokens"]) == answer["usage"]["prompt_tokens"]
    assert of_messages["count"] == chat["usage"]["prompt_tokens"]
    assert PROMPT in text["prompt"]
    assert [status for status, _ in mistakes] == [400] * 5
    assert {body["error"]["type"] for _, body in mistakes} == {"invalid_request_error"}
    assert unable == 404


async def test_sampling_is_openais_where_a_client_says_nothing(tmp_path: Path) -> None:
    async with running(planned(), tmp_path) as engine:
        answer = await ask(engine, "/completion", {"prompt": "x", "n_predict": 1})

    told = answer["generation_settings"]
    sampling = [told[name] for name in ("temperature", "top_p", "top_k", "min_p")]
    assert sampling == [1.0, 1.0, 0, 0.0]


async def test_experts_may_stay_in_host_memory(tmp_path: Path):
    variant = with_flags(planned("nano-mixtral"), "--n-cpu-moe", "3")

    async with running(variant, tmp_path) as engine:
        answer = await ask(engine, "/v1/completions", {"prompt": "x", "max_tokens": 4})

        assert answer["usage"]["completion_tokens"] == 4
        assert "tensor overrides to CPU" in engine.log.read_text()


async def test_requests_are_not_logged(tmp_path: Path):
    async with running(planned(), tmp_path) as engine:
        before = len(engine.log.read_text())
        for _ in range(5):
            await ask(engine, "/v1/completions", {"prompt": "x", "max_tokens": 4})
            await engine.observe()

        assert len(engine.log.read_text()) - before < 300


async def test_key_is_required(tmp_path: Path):
    async with running(planned(), tmp_path) as engine, aiohttp.ClientSession() as session:
        for path in ("/v1/models", "/metrics", "/slots"):
            async with session.get(engine.url + path) as response:
                assert response.status == 401


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--host-memory-bytes", str(2**50)), "GiB of host memory"),
        (("--n-gpu-layers", "9"), "install the CUDA wheel"),
        (("--override-everything",), "unrecognized arguments: --override-everything"),
    ],
)
async def test_a_start_that_fails_says_why(tmp_path: Path, flags: tuple[str, ...], said: str):
    variant = planned()
    if flags[0] == "--host-memory-bytes":  # the planned figure comes after the fleet's flags
        shape = variant.shape.model_copy(update={"host_memory_bytes": int(flags[1])})
        variant = variant.model_copy(update={"shape": shape})
    else:
        variant = with_flags(variant, *flags)

    with pytest.raises(EngineFailed, match=said):
        async with running(variant, tmp_path):
            pass


async def test_a_damaged_file_ends_the_start_with_llama_cpps_own_words(tmp_path: Path):
    file = tmp_path / "broken.gguf"
    whole = nano.ensure_gguf("nano-7b", "fp16").read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    variant = planned().model_copy(update={"checkpoint": str(file)})

    with pytest.raises(EngineFailed, match=r"(?s)corrupted or incomplete.*cannot start"):
        async with running(variant, tmp_path):
            pass
