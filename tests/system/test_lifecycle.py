"""Roll-outs, drains and places under constant streaming load, with simulated engines on a real Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from loadtests.steady_streams import SteadyStreams
from placement.plan import Plan
from tests.system.harness import PATIENCE_S, Bora, eventually, running_bora, steady_streams

pytestmark = pytest.mark.ray

FLEET = """
fleet: life
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
    max_num_seqs: 16
    replicas: {{min: {replicas}, max: {replicas}}}
    engine_args: [{flags}]
"""
BROKEN = "--sim-start-delay-s=60, --sim-fail-after-s=1"


@pytest.fixture(scope="module")
def bora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bora]:
    """Two replicas; the machine has four slots or more, so that there is room for a surge."""
    folder = tmp_path_factory.mktemp("life")
    with running_bora(folder / "state", str(a_fleet(folder))) as bora:
        bora.wait_ready()
        yield bora


def a_fleet(folder: Path, *, replicas: int = 2, flags: str = "--sim-speed=2") -> Path:
    path = folder / f"fleet-{time.monotonic_ns()}.yaml"
    path.write_text(FLEET.format(replicas=replicas, flags=flags))
    return path


def num_slots(bora: Bora, folder: Path) -> int:
    result = bora.command("plan", str(a_fleet(folder)), "--json")
    return int(json.loads(result.stdout)["gpus_total"])


def pids(bora: Bora) -> set[int]:
    replicas: list[dict[str, Any]] = bora.variant("chat")["replicas"]
    return {replica["pid"] for replica in replicas if replica["state"] == "ready"}


async def ask_directly(replica: dict[str, Any], *, tokens: int) -> None:
    """A long request at one engine, past the gateway; the key is in the engine's environment."""
    environment = (Path("/proc") / str(replica["pid"]) / "environ").read_bytes().decode()
    variables = dict(each.partition("=")[::2] for each in environment.split("\0"))
    headers = {"authorization": f"Bearer {variables['VLLM_API_KEY']}"}
    body = {"model": "chat", "prompt": "Go on", "max_tokens": tokens, "ignore_eos": True}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{replica['url']}/v1/completions", json=body) as response,
    ):
        await response.read()


async def deploy(bora: Bora, fleet: Path) -> Any:
    return await asyncio.to_thread(bora.command, "deploy", str(fleet))


async def until_only_the_new_shape_serves(bora: Bora) -> None:
    await asyncio.to_thread(eventually, lambda: bora.variant("chat")["rollout"] == "")


async def until_answered(load: SteadyStreams, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(load.outcomes) < count:
            await asyncio.sleep(0.1)


async def test_a_changed_engine_is_rolled_out_with_nothing_lost_and_capacity_kept(
    bora: Bora, tmp_path: Path
):
    before = await asyncio.to_thread(pids, bora)
    async with steady_streams(bora.url) as load:
        result = await deploy(bora, a_fleet(tmp_path, flags="--sim-speed=3"))
        await until_only_the_new_shape_serves(bora)
        await asyncio.sleep(2)

    assert result.returncode == 0, result.stderr
    after = await asyncio.to_thread(pids, bora)
    assert len(after) == 2
    assert not after & before
    assert load.failures() == []
    assert load.least_ready() >= 2
    assert len(load.outcomes) > 50


async def test_a_new_version_that_does_not_start_leaves_the_old_one_serving(
    bora: Bora, tmp_path: Path
):
    before = await asyncio.to_thread(pids, bora)
    async with steady_streams(bora.url) as load:
        result = await deploy(bora, a_fleet(tmp_path, flags=BROKEN))
        await asyncio.sleep(3)

    assert result.returncode == 5
    assert "ended while it loaded" in result.stderr
    assert "what served before serves on" in result.stderr
    assert await asyncio.to_thread(pids, bora) == before
    assert load.failures() == []
    assert load.least_ready() >= 2
    events = (await asyncio.to_thread(bora.status))["events"]
    died = [event["reason"] for event in events if event["kind"] == "replica-died"]
    assert any("simulated failure" in reason for reason in died)


async def test_where_no_room_is_left_one_old_replica_goes_first(bora: Bora, tmp_path: Path):
    slots = await asyncio.to_thread(num_slots, bora, tmp_path)
    assert (await deploy(bora, a_fleet(tmp_path, replicas=slots))).returncode == 0
    async with steady_streams(bora.url) as load:
        result = await deploy(bora, a_fleet(tmp_path, replicas=slots, flags="--sim-speed=4"))
        await until_only_the_new_shape_serves(bora)

    assert result.returncode == 0, result.stderr
    assert load.failures() == []
    assert load.least_ready() >= slots - 1


async def test_without_room_a_new_version_that_does_not_start_gives_its_place_back(
    bora: Bora, tmp_path: Path
):
    slots = await asyncio.to_thread(num_slots, bora, tmp_path)
    assert (await deploy(bora, a_fleet(tmp_path, replicas=slots))).returncode == 0
    async with steady_streams(bora.url) as load:
        result = await deploy(bora, a_fleet(tmp_path, replicas=slots, flags=BROKEN))
        await asyncio.to_thread(eventually, lambda: len(pids(bora)) == slots)

    assert result.returncode == 5
    assert load.failures() == []
    assert load.least_ready() >= slots - 1


async def test_scaling_down_takes_the_idle_replica_and_spares_the_busy_one(
    bora: Bora, tmp_path: Path
):
    """Serve by itself would take the newest; here that one is made the busy one."""
    await deploy(bora, a_fleet(tmp_path))
    await until_only_the_new_shape_serves(bora)
    wide = tmp_path / "wide.yaml"
    wide.write_text(FLEET.format(replicas=1, flags="--sim-speed=2").replace("max: 1", "max: 4"))
    assert (await deploy(bora, wide)).returncode == 0
    replicas = await asyncio.to_thread(bora.settled, "chat")
    newest = min(replicas, key=lambda replica: replica["age_s"])
    busy = asyncio.create_task(ask_directly(newest, tokens=8000))

    def serves() -> bool:
        replicas = bora.variant("chat")["replicas"]
        return any(each["replica"] == newest["replica"] and each["running"] for each in replicas)

    await asyncio.to_thread(eventually, serves)
    await asyncio.to_thread(bora.command, "scale", "chat", "1")

    def left() -> list[str]:
        return [each["replica"] for each in bora.variant("chat")["replicas"]]

    await asyncio.to_thread(eventually, lambda: left() == [newest["replica"]])
    await asyncio.sleep(3)
    assert await asyncio.to_thread(left) == [newest["replica"]]
    busy.cancel()


async def test_a_drained_replica_finishes_its_streams_and_is_replaced(bora: Bora, tmp_path: Path):
    assert (await deploy(bora, a_fleet(tmp_path))).returncode == 0
    await until_only_the_new_shape_serves(bora)
    async with steady_streams(bora.url) as load:
        await asyncio.sleep(1)
        chosen = load.busiest()
        result = await asyncio.to_thread(bora.command, "drain", chosen)
        empty_s = time.perf_counter()
        await asyncio.to_thread(eventually, lambda: len(pids(bora)) == 2)

    assert result.returncode == 0, result.stderr
    assert load.failures() == []
    since = [each.requests.get(chosen) for each in load.samples if each.at_s > empty_s]
    assert since
    assert len({count for count in since if count is not None}) <= 1  # nothing more was sent there
    assert chosen not in load.samples[-1].usable


async def test_places_are_as_planned(bora: Bora):
    variant = await asyncio.to_thread(bora.variant, "chat")

    assert variant["misplaced"] == []
    assert variant["waiting"] == ""
    assert all(replica["node_id"] for replica in variant["replicas"])


async def test_an_update_that_nobody_watches_is_stopped_and_its_room_given_back(
    bora: Bora, tmp_path: Path
):
    """As above, but the command is gone: the controller itself puts back what it took."""
    slots = await asyncio.to_thread(num_slots, bora, tmp_path)
    assert (await deploy(bora, a_fleet(tmp_path, replicas=slots))).returncode == 0
    await until_only_the_new_shape_serves(bora)
    plan = await asyncio.to_thread(
        bora.command, "plan", str(a_fleet(tmp_path, replicas=slots, flags=BROKEN)), "--json"
    )
    async with steady_streams(bora.url) as load:
        await asyncio.to_thread(bora.control().apply, Plan.model_validate_json(plan.stdout))

        def stopped() -> bool:
            variant = bora.variant("chat")
            whole = f"0 of {slots} in the new shape, {slots} in the old one"
            return bool(variant["rollout"].startswith("stopped") and whole in variant["rollout"])

        await asyncio.to_thread(eventually, stopped)
        await asyncio.sleep(3)

    assert "simulated failure" in (await asyncio.to_thread(bora.variant, "chat"))["failure"]
    assert load.failures() == []
    assert load.least_ready() >= slots - 1
    assert (await deploy(bora, a_fleet(tmp_path))).returncode == 0


async def test_a_canary_gets_its_share_and_goes_without_a_trace(bora: Bora, tmp_path: Path):
    fleet = a_fleet(tmp_path)
    assert (await deploy(bora, fleet)).returncode == 0
    with_canary = tmp_path / "canary.yaml"
    canary = "    canary: {weight: 0.25, engine_args: [--sim-speed=4]}\n"
    with_canary.write_text(fleet.read_text() + canary)
    async with steady_streams(bora.url) as load:
        result = await deploy(bora, with_canary)
        since = len(load.outcomes)
        await until_answered(load, since + 100)
        until = len(load.outcomes)
        replicas = (await asyncio.to_thread(bora.status))["variants"][1]["replicas"]
        assert (await deploy(bora, fleet)).returncode == 0
        await until_only_the_new_shape_serves(bora)

    assert result.returncode == 0, result.stderr
    used = [outcome.endpoint for outcome in load.outcomes[since:until]]
    share = sum(name == replicas[0]["replica"] for name in used) / len(used)
    assert 0.15 < share < 0.35
    assert load.failures() == []
    assert load.least_ready() >= 2
    await asyncio.to_thread(eventually, lambda: len(bora.status()["variants"]) == 1)


async def test_what_is_unknown_cannot_be_drained(bora: Bora):
    result = await asyncio.to_thread(bora.command, "drain", "nobody")

    assert result.returncode == 2
    assert "nobody" in result.stderr
