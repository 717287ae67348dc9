"""An engine's adapters follow the plan: loaded, replaced, retried, taken away."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from cluster.adapter_events import adapter_events
from cluster.adapter_folder import locate_adapter
from cluster.adapters import Adapters
from cluster.autoscaler import Autoscaler
from cluster.cli.plan_pages import migration_page
from cluster.engine_adapters import EngineAdapters
from cluster.engine_process import EngineProcess
from cluster.engines.sim import SimEngine
from cluster.errors import AdapterFailed
from cluster.registry import Registry
from cluster.shape_version import shape_version
from gateway.endpoints import ModelLoad
from placement.changes import migration
from placement.model_cache import ModelCacheSpec
from tests.builders import a_plan, a_report, a_shape, a_variant


@dataclass
class Engine:
    """Takes adapters, but those in `refused`."""

    refused: dict[str, str] = field(default_factory=dict)
    has: dict[str, str] = field(default_factory=dict)

    async def load_adapter(self, name: str, folder: Path) -> None:
        if name in self.refused:
            raise AdapterFailed(self.refused[name])
        assert name not in self.has
        self.has[name] = str(folder)

    async def unload_adapter(self, name: str) -> None:
        del self.has[name]


async def nothing() -> None:
    """Nobody listens."""


async def a_folder(source: str, tell: Callable[[str], None]) -> Path:
    tell("looking")
    return Path(source)


async def located(source: str) -> Path:
    return await locate_adapter(source, ModelCacheSpec(), Path("/dev/null"))


def some_adapters(engine: Engine) -> Adapters:
    return Adapters(engine, a_folder, retry_s=(0.02, 0.02), unload_after_s=0.1)


async def until(condition: object, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


@asynccontextmanager
async def following(adapters: Adapters) -> AsyncIterator[list[dict[str, str]]]:
    """Runs them; what is yielded grows with what may be routed to after each change."""
    told: list[dict[str, str]] = []

    async def changed() -> None:
        told.append(dict(adapters.loaded))

    task = asyncio.create_task(adapters.run_forever(changed))
    try:
        yield told
    finally:
        task.cancel()


async def test_what_is_wanted_is_loaded_and_told_one_by_one() -> None:
    engine = Engine()
    adapters = some_adapters(engine)
    adapters.want({"legal": "/a", "medical": "/b"})

    async with following(adapters) as told:
        await until(lambda: len(told) == 2)

    assert told == [{"legal": "legal"}, {"legal": "legal", "medical": "medical"}]
    assert engine.has == {"legal": "/a", "medical": "/b"}


async def test_what_is_no_longer_wanted_is_not_routed_to_at_once_and_unloaded_later() -> None:
    engine = Engine()
    adapters = some_adapters(engine)
    adapters.want({"legal": "/a"})
    async with following(adapters) as told:
        await until(lambda: told)
        adapters.want({})
        await until(lambda: len(told) == 2)
        assert (told[-1], engine.has) == ({}, {"legal": "/a"})
        await until(lambda: not engine.has)


async def test_another_source_takes_over_under_a_name_of_its_own_so_that_no_answer_changes() -> (
    None
):
    engine = Engine()
    adapters = some_adapters(engine)
    adapters.want({"legal": "/a"})
    async with following(adapters) as told:
        await until(lambda: told)
        adapters.want({"legal": "/b"})
        await until(lambda: len(told) == 2)
        served = told[-1]["legal"]
        assert engine.has == {"legal": "/a", served: "/b"}
        assert served.startswith("legal@")
        await until(lambda: engine.has == {served: "/b"})
        adapters.want({"legal": "/a"})
        await until(lambda: told[-1] == {"legal": "legal"})


async def test_a_refused_adapter_says_why_keeps_nobody_else_out_and_is_tried_again() -> None:
    engine = Engine(refused={"legal": "LoRA rank 64 is greater than max_lora_rank 16."})
    adapters = some_adapters(engine)
    adapters.want({"legal": "/a", "medical": "/b"})
    async with following(adapters) as told:
        await until(lambda: told and told[-1] == {"medical": "medical"})
        assert adapters.failures == {"legal": engine.refused["legal"]}
        await asyncio.sleep(0.1)
        assert len(told) == 2  # the same failure again is no news
        engine.refused = {}
        await until(lambda: "legal" in adapters.loaded)
    assert adapters.failures == {}


async def test_an_old_source_serves_on_while_the_new_one_fails() -> None:
    engine = Engine()
    adapters = some_adapters(engine)
    adapters.want({"legal": "/a"})
    await adapters.settle(nothing)
    adapters.want({"legal": "/b"})
    [_, served] = ["legal", adapters._served_name("legal", "/b")]
    engine.refused = {served: "broken"}
    await adapters.settle(nothing)

    assert adapters.loaded == {"legal": "legal"}
    assert adapters.failures == {"legal": "broken"}


async def test_how_far_an_adapter_is_is_told_until_it_is_here_or_failed() -> None:
    heard: list[dict[str, str]] = []

    async def locate(source: str, tell: Callable[[str], None]) -> Path:
        tell("downloading weights, 50 % of 120.0 MiB")
        heard.append(dict(adapters.stages))
        if source == "acme/gone":
            raise AdapterFailed("no such repository")
        return Path(source)

    adapters = Adapters(Engine(), locate)
    adapters.want({"legal": "acme/legal", "gone": "acme/gone"})
    await adapters.settle(nothing)

    stage = "downloading weights, 50 % of 120.0 MiB"
    assert heard == [{"legal": stage}, {"gone": stage}]
    assert adapters.stages == {}


async def test_a_folder_must_hold_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterFailed, match=r"/nowhere: no such folder on this node"):
        await located("/nowhere")
    with pytest.raises(AdapterFailed, match=r"no adapter_config.json there"):
        await located(str(tmp_path))
    with pytest.raises(AdapterFailed, match=r"~nobody-here/lora: cannot be read"):
        await located("~nobody-here/lora")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert await located(str(tmp_path)) == tmp_path


async def test_a_real_engine_process_loads_and_unloads(tmp_path: Path) -> None:
    folder = tmp_path / "legal"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8}))
    flags = ("--enable-lora", "--max-loras", "4", "--max-lora-rank", "16")
    variant = a_variant(shape=a_shape(engine_args=flags))
    process = EngineProcess(SimEngine(), variant, host="127.0.0.1", log=tmp_path / "log")
    try:
        await process.start("")
        engine = EngineAdapters(process.url, process.api_key)
        await engine.load_adapter("legal", folder)
        await engine.load_adapter("legal", folder)  # it is there: that is what was wanted
        with pytest.raises(AdapterFailed, match="No adapter found for /nowhere"):
            await engine.load_adapter("other", Path("/nowhere"))
        await engine.unload_adapter("legal")
        with pytest.raises(AdapterFailed, match="cannot be found"):
            await engine.unload_adapter("legal")
    finally:
        await asyncio.to_thread(process.stop)
    with pytest.raises(AdapterFailed, match="the engine did not answer"):
        await engine.load_adapter("legal", folder)


def test_a_running_engine_still_fits_when_only_adapters_change() -> None:
    assert shape_version(a_variant()) == shape_version(a_variant(adapters={"legal": "/a"}))


def test_the_table_says_where_adapters_are_loaded() -> None:
    registry = Registry()
    registry.report(a_report(replica="r1", adapters={"legal": "legal@1"}), now_s=0)
    registry.report(a_report(replica="r2"), now_s=0)

    table = registry.table([a_variant(adapters={"legal": "/a", "medical": "/b"})], version=1)

    assert table.models[0].adapters == ("legal", "medical")
    assert [each.adapters for each in table.endpoints] == [{"legal": "legal@1"}, {}]


def test_what_happens_to_adapters_is_told_once() -> None:
    before = a_report(adapters={"a": "a", "b": "b"}, adapter_failures={"c": "no such folder"})
    now = a_report(
        adapters={"b": "b@2", "d": "d"}, adapter_failures={"c": "no such folder", "e": "too wide"}
    )

    told = list(adapter_events(before, now))

    assert [event.text.removeprefix("replica r1: adapter ") for event in told] == [
        *("b loaded", "d loaded", "a taken out", "e not loaded"),
    ]
    assert told[-1].reason == "too wide"
    assert list(adapter_events(now, now)) == []


def test_a_download_of_an_adapter_is_told_once_with_its_size() -> None:
    reports = [
        a_report(adapter_stages={"a": stage} if stage else {})
        for stage in (
            "",
            "downloading weights, 0 % of 1.5 GiB",
            "downloading weights, 9 % of 1.5 GiB",
        )
    ]

    told = [event.text for pair in itertools.pairwise(reports) for event in adapter_events(*pair)]

    assert told == ["replica r1: downloading adapter a, 1.5 GiB"]


def test_requests_to_adapters_are_load_of_their_model() -> None:
    autoscaler = Autoscaler()
    load = ModelLoad(in_flight=1.0, queued=2, requests_total=3)
    autoscaler.observe("g", {"chat": load, "legal": load}, now_s=0)

    assert autoscaler.load("chat", "legal").queued == 4


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"legal": "/a"}, "chat: adapter legal is loaded from /a"),
        ({"legal": "/a"}, {}, "chat: adapter legal is unloaded"),
        ({"legal": "/a"}, {"legal": "/b"}, "chat: adapter legal is loaded from /b instead"),
        ({"legal": "/a"}, {"legal": "/a"}, "nothing would change"),
    ],
)
def test_a_diff_names_adapters_and_restarts_nothing_for_them(
    before: dict[str, str], after: dict[str, str], told: str
) -> None:
    plans = [a_plan(a_variant(adapters=adapters)) for adapters in (before, after)]
    console = Console(file=io.StringIO())

    moved = migration(*plans)
    console.print(migration_page(moved))

    assert moved.changes == ()
    assert console.file.getvalue().strip() == told
