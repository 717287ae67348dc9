"""Scaling, updates and bad starts, with simulated engines on a real Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from cluster.errors import ClusterError
from cluster.priority import CONTROLLER_NICENESS, STEERING_NICENESS, outrank_engines
from tests.system.harness import PATIENCE_S, Bora, eventually, running_bora

pytestmark = pytest.mark.ray

IN_FLIGHT = "bora_gateway_in_flight{"
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
# What was scaled by hand stays so, and what starts slowly is not sent to sleep before it is there.
STEADY = FLEET.replace("down_delay_s: 5", "down_delay_s: 600").replace("delay_s: 8", "delay_s: 600")


@pytest.fixture(scope="module")
def fleet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fleets") / "sim.yaml"
    path.write_text(FLEET)
    return path


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory, fleet_file: Path) -> Iterator[Bora]:
    with running_bora(tmp_path_factory.mktemp("sim") / "state", str(fleet_file)) as bora:
        bora.wait_ready()
        yield bora


@pytest.fixture(scope="module")
def steady_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fleets") / "steady.yaml"
    path.write_text(STEADY)
    return path


@pytest.fixture(scope="module")
def steady(sim: Bora, steady_file: Path) -> Bora:
    """The same, but without load nothing changes by itself."""
    result = sim.command("deploy", str(steady_file))
    assert result.returncode == 0, result.stderr
    return sim


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
    """Arrivals at a rate that can be changed; remembers every outcome.

    A hundred may be without an answer: more than four replicas take, and fewer than fill a queue
    while a slow machine still starts these.
    """

    most_at_once = 100

    def __init__(self, url: str) -> None:
        self._url = url
        self.rate = 0.0
        self.num_asked = 0
        self.outcomes: list[str] = []

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            while self.rate >= 0:
                if self.rate == 0 or self.num_asked - len(self.outcomes) >= self.most_at_once:
                    await asyncio.sleep(0.05)
                    continue
                self.num_asked += 1
                group.create_task(self._one(session, stream=self.num_asked % 2 == 0))
                await asyncio.sleep(1 / self.rate)

    async def _one(self, session: aiohttp.ClientSession, *, stream: bool) -> None:
        self.outcomes.append(await ask(session, self._url, tokens=32, stream=stream))

    @property
    def failures(self) -> list[str]:
        return [outcome for outcome in self.outcomes if outcome.startswith("!")]


async def ready(sim: Bora) -> int:
    return (await asyncio.to_thread(sim.variant, "chat"))["ready"]


async def until_ready(sim: Bora, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await ready(sim) != count:
            await asyncio.sleep(0.3)


def num_in_flight(sim: Bora) -> float:
    """Requests that the gateway has at engines."""
    with urllib.request.urlopen(f"{sim.url}/metrics", timeout=PATIENCE_S) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(IN_FLIGHT))


async def test_replicas_follow_the_load_up_down_to_zero_and_back(sim: Bora):
    """5 -> 100 -> 5 -> 0 requests/s: 1 -> 4 -> 1 -> 0 -> 1 replicas, and no request fails."""
    load = Load(sim.url)
    running = asyncio.create_task(load.run())

    load.rate = 5
    await asyncio.sleep(3)
    await until_ready(sim, 1)
    load.rate = 100
    await until_ready(sim, 4)
    load.rate = 5
    await until_ready(sim, 1)
    load.rate = 0
    await until_ready(sim, 0)
    load.rate = 5
    await until_ready(sim, 1)
    load.rate = -1
    await running

    assert load.failures == []
    assert len(load.outcomes) > 150
    assert len(set(load.outcomes)) == 1  # every answer is whole: they all say the same


async def test_a_long_stream_survives_the_removal_of_its_replica(steady: Bora):
    """Draining: routed away, finished, then stopped."""
    await asyncio.to_thread(steady.command, "scale", "chat", "2")
    async with aiohttp.ClientSession() as session:
        await until_ready(steady, 2)
        streams = [ask(session, steady.url, tokens=400, stream=True) for _ in range(8)]
        answers = asyncio.gather(*streams)
        await asyncio.to_thread(eventually, lambda: num_in_flight(steady) == 8)
        await asyncio.to_thread(steady.command, "scale", "chat", "1")
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


async def test_deploying_again_with_other_bounds_restarts_nothing(steady: Bora, tmp_path: Path):
    async with aiohttp.ClientSession() as session:
        assert not (await ask(session, steady.url, tokens=4, stream=False)).startswith("!")
    before = await asyncio.to_thread(steady.settled, "chat")
    changed = tmp_path / "fleet.yaml"
    changed.write_text(STEADY.replace("min: 0", "min: 1"))

    result = await asyncio.to_thread(steady.command, "deploy", str(changed))

    assert result.returncode == 0, result.stderr
    after = await asyncio.to_thread(steady.variant, "chat")
    assert after["min_replicas"] == 1
    assert [replica["pid"] for replica in after["replicas"]] == [
        replica["pid"] for replica in before
    ]


async def test_engines_have_the_priority_of_who_started_bora_and_what_steers_them_a_higher_one(
    steady: Bora,
):
    """Ray itself would put its workers, and engines with them, at nice 15."""
    async with aiohttp.ClientSession() as session:
        assert not (await ask(session, steady.url, tokens=4, stream=False)).startswith("!")
    [replica] = await asyncio.to_thread(steady.settled, "chat")
    guard = psutil.Process(replica["pid"])
    [engine] = guard.children()
    actors = ("ServeReplica", "ControllerActor", "GatewayActor")
    hosts = [await asyncio.to_thread(_pid_of, steady, actor) for actor in actors]

    processes = {"engine": engine, **dict(zip(actors, map(psutil.Process, hosts), strict=True))}

    shell = psutil.Process(steady.process.pid).nice()
    gateway, controller = STEERING_NICENESS, CONTROLLER_NICENESS
    if not _may_outrank():
        gateway = controller = shell
    assert {name: process.nice() for name, process in processes.items()} == {
        "engine": shell,
        "ServeReplica": shell,
        "ControllerActor": controller,
        "GatewayActor": gateway,
    }


def _may_outrank() -> bool:
    with subprocess.Popen(["sleep", "60"]) as process:
        allowed = outrank_engines(process.pid)
        process.kill()
    return allowed


async def test_a_fleet_whose_models_sleep_can_be_deployed_and_wakes(
    steady: Bora, steady_file: Path
):
    await asyncio.to_thread(steady.command, "deploy", str(steady_file))
    assert (await asyncio.to_thread(steady.command, "scale", "chat", "0")).returncode == 0
    await until_ready(steady, 0)

    result = await asyncio.to_thread(steady.command, "deploy", str(steady_file))

    assert result.returncode == 0, result.stderr
    assert (await asyncio.to_thread(steady.variant, "chat"))["wanted"] == 0
    async with aiohttp.ClientSession() as session:
        assert not (await ask(session, steady.url, tokens=4, stream=False)).startswith("!")


async def test_a_controller_killed_while_all_models_sleep_still_wakes_them(
    steady: Bora, steady_file: Path
):
    await asyncio.to_thread(steady.command, "deploy", str(steady_file))
    assert (await asyncio.to_thread(steady.command, "scale", "chat", "0")).returncode == 0
    await until_ready(steady, 0)

    os.kill(await asyncio.to_thread(_pid_of, steady, "ControllerActor"), signal.SIGKILL)

    async with aiohttp.ClientSession() as session:
        assert not (await ask(session, steady.url, tokens=4, stream=False)).startswith("!")


async def test_a_killed_gateway_host_brings_its_gateway_back(steady: Bora):
    os.kill(await asyncio.to_thread(_pid_of, steady, "GatewayActor"), signal.SIGKILL)

    def reports_again() -> bool:
        return len(steady.status()["gateways"]) == 1

    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        while (await ask(session, steady.url, tokens=4, stream=False)).startswith("!"):
            await asyncio.sleep(0.3)
    await asyncio.to_thread(eventually, reports_again)


async def test_an_infeasible_fleet_changes_nothing(steady: Bora, tmp_path: Path):
    impossible = tmp_path / "fleet.yaml"
    impossible.write_text("fleet: x\nmodels: [{name: big, model: mistral-large-3-675b-2512}]\n")
    before = await asyncio.to_thread(steady.variant, "chat")

    result = await asyncio.to_thread(steady.command, "deploy", str(impossible))

    assert result.returncode == 3
    assert "GiB" in result.stderr
    assert (await asyncio.to_thread(steady.variant, "chat"))["variant"] == before["variant"]


async def test_a_deployment_whose_engine_does_not_start_is_taken_back(steady: Bora, tmp_path: Path):
    broken = tmp_path / "fleet.yaml"
    flags = "    engine_args: [--sim-start-delay-s=60, --sim-fail-after-s=4]\n"
    other = STEADY.split("models:\n")[1].replace("name: chat", "name: other")
    broken.write_text(STEADY + other + flags)

    result = await asyncio.to_thread(steady.command, "deploy", str(broken))

    assert result.returncode == 5
    assert "loading weights" in result.stderr
    assert "taken back" in result.stderr

    def models() -> list[str]:
        return [variant["model"] for variant in steady.status()["variants"]]

    await asyncio.to_thread(eventually, lambda: models() == ["chat"])
    async with aiohttp.ClientSession() as session:
        assert not (await ask(session, steady.url, tokens=4, stream=False)).startswith("!")


async def test_the_controller_can_be_killed_while_requests_flow(steady: Bora, fleet_file: Path):
    """Ray starts it again; gateways keep the last table meanwhile."""
    await asyncio.to_thread(steady.command, "scale", "chat", "2")
    await until_ready(steady, 2)
    load = Load(steady.url)
    running = asyncio.create_task(load.run())
    load.rate = 10
    await asyncio.to_thread(eventually, lambda: num_in_flight(steady) > 0)
    version = (await asyncio.to_thread(steady.status))["table_version"]

    pid = await asyncio.to_thread(_pid_of, steady, "ControllerActor")
    os.kill(pid, signal.SIGKILL)

    def recovered() -> bool:
        with contextlib.suppress(ClusterError):
            return steady.status()["table_version"] > version
        return False

    await asyncio.to_thread(eventually, recovered)
    assert (await asyncio.to_thread(steady.variant, "chat"))["wanted"] == 2  # not forgotten
    assert (await asyncio.to_thread(steady.command, "deploy", str(fleet_file))).returncode == 0
    await until_ready(steady, 1)  # scaled down, since 10 requests/s need only one
    load.rate = -1
    await running
    assert load.failures == []


def _pid_of(bora: Bora, actor: str) -> int:
    """Ray names its worker processes after the actor they run."""
    name = f"ray::{actor}".encode()
    for pid in bora.processes():
        with contextlib.suppress(OSError):  # it has ended since
            if (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(name):
                return pid
    raise AssertionError(f"no process of {actor}")


async def test_down_lets_streams_finish_and_leaves_no_process(sim: Bora):
    async with aiohttp.ClientSession() as session:
        stream = asyncio.create_task(ask(session, sim.url, tokens=400, stream=True))
        await asyncio.to_thread(eventually, lambda: num_in_flight(sim) == 1)
        result = await asyncio.to_thread(sim.command, "down")
        text = await stream

    assert result.returncode == 0, result.stderr
    assert not text.startswith("!")
    assert sim.ended() == 0
    assert sim.processes() == []


def test_ctrl_c_while_starting_leaves_no_process(tmp_path: Path, fleet_file: Path):
    with running_bora(tmp_path / "state", str(fleet_file)) as bora:
        bora.wait_until(lambda: len(bora.processes()) > 3)

        assert bora.interrupt() == 0

        assert bora.processes() == []
        assert "nothing of bora is left running" in bora.said()
        assert bora.command("status").returncode == 4


@pytest.mark.parametrize(
    ("file", "words", "end"),
    [
        ("context.json", "", "SIGTERM"),
        ("context.json", "", "down"),
        ("run/logs/ray.log", "", "SIGHUP"),
        ("run/logs/ray.log", "Ray runtime started", "SIGTERM"),
        ("run/logs/ray.log", "Ray runtime started", "SIGHUP"),
        ("run/logs/ray.log", "Ray runtime started", "down"),
    ],
)
def test_ending_it_while_it_starts_is_clean(
    tmp_path: Path, fleet_file: Path, file: str, words: str, end: str
):
    """Before Ray, while Ray starts, and while controller and gateway are put on it."""
    with running_bora(tmp_path / "state", str(fleet_file)) as bora:
        told = bora.state / file
        bora.wait_until(lambda: told.exists() and words in told.read_text())

        if end == "down":
            assert bora.command("down").returncode == 0
        else:
            bora.process.send_signal(signal.Signals[end])

        assert bora.ended() == 0
        assert bora.processes() == []
        assert "nothing of bora is left running" in bora.said()


def test_kill_9_of_bora_up_leaves_no_process(tmp_path: Path, fleet_file: Path):
    with running_bora(tmp_path / "state", str(fleet_file)) as bora:
        bora.wait_ready()

        bora.process.kill()
        bora.process.wait()

        eventually(lambda: bora.processes() == [])
        assert bora.command("down").returncode == 0


def test_an_engine_that_dies_while_loading_ends_the_start_with_its_log(tmp_path: Path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(STEADY + "    engine_args: [--sim-start-delay-s=60, --sim-fail-after-s=1]\n")
    with running_bora(tmp_path / "state", str(broken)) as bora:
        assert bora.ended() == 5

        assert "ended while it loaded" in bora.said()
        assert "loading" in bora.said()  # the engine's own words
        assert bora.processes() == []


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path, fleet_file: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running_bora(tmp_path / "state", str(fleet_file), http_port=port) as bora:
            assert bora.ended() == 2
            assert f"127.0.0.1:{port}" in bora.said()
            assert "starting Ray" not in bora.said()
