"""Adapters of the simulated engine: vLLM's paths, refusals and names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from cluster.engines.sim import SimEngine
from tests.builders import a_shape, a_variant
from tests.cluster.test_sim_server import ask, serving, settings

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
WITH_ADAPTERS = replace(settings(), max_lora_rank=16)


def an_adapter(folder: Path, rank: int = 8) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "name": folder.name}))
    return str(folder)


async def post(session: aiohttp.ClientSession, path: str, **body: object) -> tuple[int, str]:
    async with session.post(path, json=body) as response:
        return response.status, await response.text()


async def text_of(session: aiohttp.ClientSession, model: str) -> tuple[str, str]:
    answer = await ask(session, "/v1/completions", model=model, prompt="wind", max_tokens=12)
    return answer["model"], answer["choices"][0]["text"]


async def test_an_adapter_is_loaded_answers_and_goes(tmp_path: Path) -> None:
    path = an_adapter(tmp_path / "legal")
    async with serving(WITH_ADAPTERS) as session:
        assert await post(session, LOAD, lora_name="legal", lora_path=path) == (
            200,
            "Success: LoRA adapter 'legal' added successfully.",
        )
        of_model, of_adapter = await text_of(session, "chat"), await text_of(session, "legal")
        again = await text_of(session, "legal")
        async with session.get("/v1/models") as response:
            cards = (await response.json())["data"]
        gone = await post(session, UNLOAD, lora_name="legal")
        refused = await ask(session, "/v1/completions", expect=404, model="legal", prompt="wind")

    assert (of_model[0], of_adapter[0]) == ("chat", "legal")
    assert of_model[1] != of_adapter[1] == again[1]
    assert [(card["id"], card["parent"]) for card in cards] == [("chat", None), ("legal", "chat")]
    assert gone[0] == 200
    assert refused["error"]["message"] == "The model `legal` does not exist."


async def test_what_cannot_be_loaded_is_refused_as_by_vllm(tmp_path: Path) -> None:
    path, wide = an_adapter(tmp_path / "legal"), an_adapter(tmp_path / "wide", rank=64)
    async with serving(WITH_ADAPTERS) as session:
        await post(session, LOAD, lora_name="legal", lora_path=path)
        twice = await post(session, LOAD, lora_name="legal", lora_path=path)
        nowhere = await post(session, LOAD, lora_name="other", lora_path="/nowhere")
        too_wide = await post(session, LOAD, lora_name="wide", lora_path=wide)
        unnamed = await post(session, LOAD, lora_path=path)
        unknown = await post(session, UNLOAD, lora_name="other")

    assert [each[0] for each in (twice, nowhere, too_wide, unnamed, unknown)] == [
        *(400, 404, 500, 400, 404),
    ]
    assert "No adapter found for /nowhere" in nowhere[1]
    assert "LoRA rank 64 is greater than max_lora_rank 16" in too_wide[1]


async def test_without_the_flag_there_are_no_such_paths(tmp_path: Path) -> None:
    async with serving(settings()) as session:
        status, _ = await post(session, LOAD, lora_name="legal", lora_path=str(tmp_path))

    assert status == 404


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--enable-lora", "--max-loras", "4", "--max-lora-rank", "32"), ("--max-lora-rank", "32")),
        ((), ()),
    ],
)
def test_the_plans_flags_reach_the_simulator(
    arguments: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    variant = a_variant(shape=a_shape(engine_args=arguments))

    command = (
        SimEngine().launch(variant, checkpoint="", host="127.0.0.1", port=1, api_key="").command
    )

    assert ("--enable-lora" in command) is bool(arguments)
    assert "--max-loras" not in command
    assert set(expected) <= set(command)
