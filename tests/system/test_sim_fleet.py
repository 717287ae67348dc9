"""Scaling, updates and bad starts, with simulated engines on a real Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.system.harness import Bora, eventually, running_bora

pytestmark = pytest.mark.ray

FLEET = """
fleet: sim
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
    max_num_seqs: 16
    replicas: {min: 0, max: 4}
    scaling: {scale_up_delay_s: 1, scale_down_delay_s: 5, scale_to_zero_delay_s: 8}
"""


@pytest.fixture(scope="module")
def fleet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fleets") / "sim.yaml"
    path.write_text(FLEET)
    return path


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory, fleet_file: Path) -> Iterator[Bora]:
    with running_bora(tmp_path_factory.mktemp("sim") / "state", str(fleet_file)) as bora:
        bora.wait_ready(120)
        yield bora


async def ask(session: aiohttp.ClientSession, url: str, *, tokens: int, stream: bool) -> str:
    """One request; its text, or an error that starts with `!`."""
    body = {
        "model": "chat",
        "prompt": "Tell me",
        "max_tokens": tokens,
        "stream": stream,
        "ignore_eos": True,
    }
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            raw = await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"! {error!r}"
    if response.status != 200:
        return f"! {response.status} {raw}"
    if not stream:
        return str(json.loads(raw)["choices"][0]["text"])
    events = [line[6:] for line in raw.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return f"! stream ends with {raw[-200:]!r}"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


class Load:
    """Open-loop arrivals at a rate that can be changed; remembers every outcome."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.rate = 0.0
        self.outcomes: list[str] = []

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            number = 0
            while self.rate >= 0:
                if self.rate == 0:
                    await asyncio.sleep(0.05)
                    continue
                number += 1
                group.create_task(self._one(session, stream=number % 2 == 0))
                await asyncio.sleep(1 / self.rate)

    async def _one(self, session: aiohttp.ClientSession, *, stream: bool) -> None:
        self.outcomes.append(await ask(session, self._url, tokens=32, stream=stream))

    @property
    def failures(self) -> list[str]:
        return [outcome for outcome in self.outcomes if outcome.startswith("!")]


async def ready(sim: Bora) -> int:
    return (await asyncio.to_thread(sim.variant, "chat"))["ready"]


async def until_ready(sim: Bora, count: int, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while await ready(sim) != count:
            await asyncio.sleep(0.3)


async def test_replicas_follow_the_load_up_down_to_zero_and_back(sim: Bora):
    """5 -> 100 -> 5 -> 0 requests/s: 1 -> 4 -> 1 -> 0 -> 1 replicas, and no request fails."""
    load = Load(sim.url)
    running = asyncio.create_task(load.run())

    load.rate = 5
    await asyncio.sleep(3)
    await until_ready(sim, 1, 20)
    load.rate = 100
    await until_ready(sim, 4, 60)
    load.rate = 5
    await until_ready(sim, 1, 60)
    load.rate = 0
    await until_ready(sim, 0, 60)
    load.rate = 5
    await until_ready(sim, 1, 30)
    load.rate = -1
    await running

    assert load.failures == []
    assert len(load.outcomes) > 300
    assert len(set(load.outcomes)) == 1  # every answer is whole: they all say the same


async def test_a_long_stream_survives_the_removal_of_its_replica(sim: Bora):
    """Draining: routed away, finished, then stopped."""
    await asyncio.to_thread(sim.command, "scale", "chat", "2")
    async with aiohttp.ClientSession() as session:
        await until_ready(sim, 2, 30)
        streams = [ask(session, sim.url, tokens=400, stream=True) for _ in range(8)]
        answers = asyncio.gather(*streams)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(sim.command, "scale", "chat", "1")
        texts = await answers
    assert not [text for text in texts if text.startswith("!")]
    assert len(set(texts)) == 1


async def test_scaling_beyond_the_fleets_bounds_is_refused(sim: Bora):
    result = await asyncio.to_thread(sim.command, "scale", "chat", "9")

    assert result.returncode == 2
    assert "0..4" in result.stderr


async def test_a_second_bora_up_in_the_same_place_is_refused(sim: Bora, fleet_file: Path):
    result = await asyncio.to_thread(sim.command, "up", str(fleet_file))

    assert result.returncode == 2
    assert "already runs" in result.stderr
    assert await asyncio.to_thread(sim.status)


async def test_deploying_again_with_other_bounds_restarts_nothing(sim: Bora, tmp_path: Path):
    async with aiohttp.ClientSession() as session:
        assert not (await ask(session, sim.url, tokens=4, stream=False)).startswith("!")
    before = (await asyncio.to_thread(sim.variant, "chat"))["replicas"]
    changed = tmp_path / "fleet.yaml"
    changed.write_text(FLEET.replace("min: 0", "min: 1"))

    result = await asyncio.to_thread(sim.command, "deploy", str(changed))

    assert result.returncode == 0, result.stderr
    after = await asyncio.to_thread(sim.variant, "chat")
    assert after["min_replicas"] == 1
    assert [replica["pid"] for replica in after["replicas"]] == [
        replica["pid"] for replica in before
    ]


async def test_a_fleet_whose_models_sleep_can_be_deployed_and_wakes(sim: Bora, fleet_file: Path):
    await asyncio.to_thread(sim.command, "deploy", str(fleet_file))
    assert (await asyncio.to_thread(sim.command, "scale", "chat", "0")).returncode == 0
    await until_ready(sim, 0, 30)

    result = await asyncio.to_thread(sim.command, "deploy", str(fleet_file))

    assert result.returncode == 0, result.stderr
    assert (await asyncio.to_thread(sim.variant, "chat"))["wanted"] == 0
    async with aiohttp.ClientSession() as session:
        assert not (await ask(session, sim.url, tokens=4, stream=False)).startswith("!")


async def test_a_controller_killed_while_all_models_sleep_still_wakes_them(
    sim: Bora, fleet_file: Path
):
    await asyncio.to_thread(sim.command, "deploy", str(fleet_file))
    assert (await asyncio.to_thread(sim.command, "scale", "chat", "0")).returncode == 0
    await until_ready(sim, 0, 30)

    os.kill(await asyncio.to_thread(_pid_of, sim, "ControllerActor"), signal.SIGKILL)

    async with aiohttp.ClientSession() as session:
        assert not (await ask(session, sim.url, tokens=4, stream=False)).startswith("!")


async def test_a_killed_gateway_host_brings_its_gateway_back(sim: Bora):
    os.kill(await asyncio.to_thread(_pid_of, sim, "GatewayActor"), signal.SIGKILL)

    def reports_again() -> bool:
        return len(sim.status()["gateways"]) == 1

    async with asyncio.timeout(60), aiohttp.ClientSession() as session:
        while (await ask(session, sim.url, tokens=4, stream=False)).startswith("!"):
            await asyncio.sleep(0.3)
    await asyncio.to_thread(eventually, reports_again, 30)


async def test_an_infeasible_fleet_changes_nothing(sim: Bora, tmp_path: Path):
    impossible = tmp_path / "fleet.yaml"
    impossible.write_text("fleet: x\nmodels: [{name: big, model: mistral-large-3-675b-2512}]\n")
    before = await asyncio.to_thread(sim.variant, "chat")

    result = await asyncio.to_thread(sim.command, "deploy", str(impossible))

    assert result.returncode == 3
    assert "GiB" in result.stderr
    assert (await asyncio.to_thread(sim.variant, "chat"))["variant"] == before["variant"]


async def test_a_deployment_whose_engine_does_not_start_is_taken_back(sim: Bora, tmp_path: Path):
    broken = tmp_path / "fleet.yaml"
    flags = "    engine_args: [--sim-start-delay-s=60, --sim-fail-after-s=1]\n"
    other = FLEET.split("models:\n")[1].replace("name: chat", "name: other")
    broken.write_text(FLEET + other + flags)

    result = await asyncio.to_thread(sim.command, "deploy", str(broken))

    assert result.returncode == 5
    assert "loading weights" in result.stderr
    assert "taken back" in result.stderr
    assert [v["model"] for v in (await asyncio.to_thread(sim.status))["variants"]] == ["chat"]
    async with aiohttp.ClientSession() as session:
        assert not (await ask(session, sim.url, tokens=4, stream=False)).startswith("!")


async def test_the_controller_can_be_killed_while_requests_flow(sim: Bora):
    """Ray starts it again; gateways keep the last table meanwhile."""
    await asyncio.to_thread(sim.command, "scale", "chat", "2")
    await until_ready(sim, 2, 30)
    load = Load(sim.url)
    running = asyncio.create_task(load.run())
    load.rate = 10
    await asyncio.sleep(1)
    version = (await asyncio.to_thread(sim.status))["table_version"]

    pid = await asyncio.to_thread(_pid_of, sim, "ControllerActor")
    os.kill(pid, signal.SIGKILL)

    def recovered() -> bool:
        result = sim.command("status", "--json")
        return result.returncode == 0 and json.loads(result.stdout)["table_version"] > version

    await asyncio.to_thread(eventually, recovered, 60)
    assert (await asyncio.to_thread(sim.variant, "chat"))["wanted"] == 2  # not forgotten
    await until_ready(sim, 1, 40)  # and scaled down, since 10 requests/s need only one
    load.rate = -1
    await running
    assert load.failures == []


def _pid_of(sim: Bora, actor: str) -> int:
    """Ray names its worker processes after the actor they run."""
    for pid in sim.processes():
        if (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(f"ray::{actor}".encode()):
            return pid
    raise AssertionError(f"no process of {actor}")


async def test_down_lets_streams_finish_and_leaves_no_process(sim: Bora):
    async with aiohttp.ClientSession() as session:
        stream = asyncio.create_task(ask(session, sim.url, tokens=200, stream=True))
        await asyncio.sleep(1)
        result = await asyncio.to_thread(sim.command, "down", timeout_s=120)
        text = await stream

    assert result.returncode == 0, result.stderr
    assert not text.startswith("!")
    assert sim.process.wait(10) == 0
    assert sim.processes() == []


def test_ctrl_c_while_starting_leaves_no_process(tmp_path: Path, fleet_file: Path):
    with running_bora(tmp_path / "state", str(fleet_file)) as bora:
        eventually(lambda: len(bora.processes()) > 3, 60)

        assert bora.interrupt() == 0

        assert bora.processes() == []
        assert "nothing of bora is left running" in bora.said()
        assert bora.command("status").returncode == 4


@pytest.mark.parametrize("end", ["SIGTERM", "SIGHUP", "down"])
@pytest.mark.parametrize("after_s", [0.7, 4.5])
def test_ending_it_while_it_starts_is_clean(
    tmp_path: Path, fleet_file: Path, end: str, after_s: float
):
    """Before Ray, and while controller and gateway are put on it."""
    with running_bora(tmp_path / "state", str(fleet_file)) as bora:
        eventually((bora.state / "context.json").exists, 30)
        time.sleep(after_s)

        if end == "down":
            assert bora.command("down").returncode == 0
        else:
            bora.process.send_signal(signal.Signals[end])

        assert bora.process.wait(60) == 0
        assert bora.processes() == []
        assert "nothing of bora is left running" in bora.said()


def test_kill_9_of_bora_up_leaves_no_process(tmp_path: Path, fleet_file: Path):
    with running_bora(tmp_path / "state", str(fleet_file)) as bora:
        bora.wait_ready(120)

        bora.process.kill()
        bora.process.wait()

        eventually(lambda: bora.processes() == [], 30)
        assert bora.command("down").returncode == 0


def test_an_engine_that_dies_while_loading_ends_the_start_with_its_log(
    tmp_path: Path, fleet_file: Path
):
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        fleet_file.read_text() + "    engine_args: [--sim-start-delay-s=60, --sim-fail-after-s=1]\n"
    )
    with running_bora(tmp_path / "state", str(broken)) as bora:
        assert bora.process.wait(120) == 5

        assert "ended while it loaded" in bora.said()
        assert "loading" in bora.said()  # the engine's own words
        assert bora.processes() == []


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path, fleet_file: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running_bora(tmp_path / "state", str(fleet_file), http_port=port) as bora:
            assert bora.process.wait(60) == 2
            assert f"127.0.0.1:{port}" in bora.said()
            assert "starting Ray" not in bora.said()
