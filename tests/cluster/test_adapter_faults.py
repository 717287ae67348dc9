"""Adapters of an engine that is slow, silent, or refuses, while other adapters are asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.adapter_folder import locate_adapter
from cluster.adapters import Adapters
from cluster.engine_adapters import EngineAdapters
from cluster.errors import AdapterFailed, EngineSilent
from placement.model_cache import ModelCacheSpec
from tests.cluster.test_adapters import Engine, a_folder, following, nothing, until


class Unsteady(Engine):
    """Answers as `moods` say, one after another: well, silent although it did it, silent, refusing."""

    def __init__(self, *moods: str) -> None:
        super().__init__()
        self.moods = list(moods)

    async def load_adapter(self, name: str, folder: Path) -> None:
        mood = self._mood()
        if mood == "refuses":
            raise AdapterFailed("no")
        if mood != "silent":
            self.has[name] = str(folder)  # instead of what it had (`EngineAdapters`)
        self._answer(mood)

    async def unload_adapter(self, name: str) -> None:
        mood = self._mood()
        if mood != "silent" and self.has.pop(name, None) is None:
            raise AdapterFailed(f"{name} cannot be found")
        self._answer(mood)

    def _mood(self) -> str:
        return self.moods.pop(0) if self.moods else "well"

    def _answer(self, mood: str) -> None:
        if mood in ("silent", "did"):
            raise EngineSilent("no answer")


def followed(engine: Engine) -> Adapters:
    return Adapters(engine, a_folder, retry_s=(0.001, 0.004), unload_after_s=0.002)


async def test_another_source_is_not_taken_for_one_whose_loading_was_never_answered():
    engine = Unsteady("did")
    adapters = followed(engine)
    adapters.want({"legal": "/a"})
    await adapters.settle(nothing)
    adapters.want({})
    adapters.want({"legal": "/b"})
    await adapters.settle(nothing)

    assert engine.has[adapters.loaded["legal"]] == "/b"


async def test_what_an_engine_loaded_without_saying_so_is_unloaded_when_nobody_wants_it():
    engine = Unsteady("did", "silent", "silent")
    adapters = followed(engine)
    adapters.want({"legal": "/a"})
    async with following(adapters):
        await until(lambda: "legal" in adapters.failures or adapters.loaded)
        adapters.want({})
        await until(lambda: not engine.has)


async def test_what_is_taken_out_is_not_routed_to_while_another_one_is_downloaded():
    arrived, downloading = asyncio.Event(), asyncio.Event()

    async def locate(source: str, tell: Callable[[str], None]) -> Path:
        if source == "/large":
            downloading.set()
            await arrived.wait()
        return Path(source)

    adapters = Adapters(Engine(), locate)
    adapters.want({"bad": "/bad"})
    async with following(adapters):
        await until(lambda: adapters.loaded)
        adapters.want({"bad": "/bad", "large": "/large"})
        await downloading.wait()
        adapters.want({"large": "/large"})
        assert adapters.loaded == {}
        arrived.set()
        await until(lambda: adapters.loaded == {"large": "large"})


async def test_a_failing_adapter_keeps_its_pause_while_another_is_unloaded():
    engine, tries = Engine(), []

    async def locate(source: str, tell: Callable[[str], None]) -> Path:
        tries.append(source)
        if source == "/gone":
            raise AdapterFailed("no such folder")
        return Path(source)

    adapters = Adapters(engine, locate, retry_s=(60.0, 60.0), unload_after_s=0.01)
    adapters.want({"medical": "/b"})
    await adapters.settle(nothing)
    adapters.want({"legal": "/gone"})
    async with following(adapters):
        await until(lambda: not engine.has)
        await asyncio.sleep(0.05)

    assert tries == ["/b", "/gone"]


async def test_a_cache_that_cannot_be_written_fails_an_adapter_and_not_its_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = "2" * 40
    snapshot = tmp_path / "models--acme--lora" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (snapshot / name).write_text("{}")
    kept = snapshot.parents[1] / ".bora"
    kept.mkdir()
    entries = '[["adapter_config.json", 2, ""], ["adapter_model.safetensors", 2, ""]]'
    (kept / f"{commit}.json").write_text(entries)
    (tmp_path / ".locks").write_text("no folder")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(AdapterFailed, match=r"acme/lora@2+: .*\.locks"):
        await locate_adapter(f"acme/lora@{commit}", ModelCacheSpec(), tmp_path / "log")


@settings(max_examples=60)
@given(
    wishes=st.lists(
        st.dictionaries(st.sampled_from("xy"), st.sampled_from(["/a", "/b", "/c"])),
        min_size=1,
        max_size=6,
    ),
    moods=st.lists(st.sampled_from(["well", "did", "silent", "refuses"]), max_size=12),
    rounds=st.integers(1, 3),
)
def test_in_the_end_the_engine_has_what_is_wanted_and_nothing_else(
    wishes: list[dict[str, str]], moods: list[str], rounds: int
):
    engine = Unsteady(*moods)
    adapters = followed(engine)

    def right() -> bool:
        return all(engine.has.get(served) == adapters._wanted[name]
                   for name, served in adapters.loaded.items())  # fmt: skip

    async def story() -> None:
        wished: dict[str, str] = {}
        for wish in wishes:
            adapters.want(wish)
            for _ in range(rounds):
                await adapters.settle(nothing)
            # The one before serves on where the new one fails.
            assert right() or adapters.failures
            wished = wish
        engine.moods.clear()
        deadline = time.monotonic() + 60
        while len(engine.has) != len(wished) or set(adapters.loaded) != set(wished):
            assert time.monotonic() < deadline
            await adapters.settle(nothing)
            await asyncio.sleep(0.001)
        assert right()
        assert adapters.failures == {}

    asyncio.run(story())


async def test_an_engine_that_has_the_name_already_gets_these_files_under_it():
    has = {"legal": "/a"}  # of a call that was given up too early

    async def load(request: web.Request) -> web.Response:
        body = await request.json()
        if body["lora_name"] in has:
            text = f"The lora adapter '{body['lora_name']}' has already been loaded."
            return web.json_response({"error": {"message": text}}, status=400)
        has[body["lora_name"]] = body["lora_path"]
        return web.Response()

    async def unload(request: web.Request) -> web.Response:
        del has[(await request.json())["lora_name"]]
        return web.Response()

    app = web.Application()
    app.add_routes(
        [web.post("/v1/load_lora_adapter", load), web.post("/v1/unload_lora_adapter", unload)]
    )
    async with TestServer(app) as server:
        await EngineAdapters(str(server.make_url("")).rstrip("/"), "key").load_adapter(
            "legal", Path("/b")
        )

    assert has == {"legal": "/b"}
