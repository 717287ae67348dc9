"""Parts of a cluster die under streams; the fault table says what that cost: `make drill-cluster`.

    python -m loadtests.drill_cluster [--only engine-kill,node] [--clients 12]

Starts three Ray nodes on this machine (a head and two workers) with simulated engines, keeps streams
running, and for each death measures how long requests still went there, how long capacity was short,
and how many requests failed. Ends with status 1 if a row misses its limits.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from loadtests.drill_cluster_processes import DrillCluster, drill_cluster
from loadtests.drill_processes import Process, free_ports
from loadtests.processes import CannotRun
from loadtests.steady_streams import SteadyStreams

_MODEL = "chat"
_REPLICAS = 2
_SLOTS = 3  # of each worker: the other one has room for all replicas
_ENGINE_START_S = 3.0  # that the simulated engine takes to load
_GRACE_S = 5.0  # from an engine's start-up to full capacity
_WATCHED_S = 60.0
_SETTLED_S = 3.0
_FLEET = f"""
fleet: drill
models:
  - name: {_MODEL}
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
    max_num_seqs: 32
    replicas: {{min: {_REPLICAS}, max: {_REPLICAS}}}
    engine_args: [--sim-speed=2, --sim-start-delay-s={_ENGINE_START_S:g}]
gateway: {{http_port: HTTP, grpc_port: GRPC}}
"""
_HEADER = (
    "| death | no request there after s (limit) | full capacity after s (limit) | requests "
    "| failed | restarted | holds |\n| --- | ---: | ---: | ---: | ---: | --- | --- |"
)


@dataclass(frozen=True, slots=True)
class Death:
    """What dies. `kill` gets the cluster and the replica whose engine, process or node it hits.

    `away_s`: by then no request goes there; None: nothing that serves is hit. `full_s`: by then
    everything is as before, beyond the start-up of an engine where one starts.
    """

    name: str
    kill: Callable[[DrillCluster, Mapping[str, Any]], None]
    away_s: float | None
    full_s: float | None = _GRACE_S
    starts_engine: bool = True
    may_fail: bool = False  # where there is only one


@dataclass(frozen=True, slots=True)
class Row:
    """What a death cost. None: nothing to measure, or it did not happen while it was watched."""

    death: Death
    away_s: float | None
    full_s: float | None
    requests: int
    failed: int
    restarted: str
    engine_start_s: float
    example: str = ""

    @property
    def full_limit_s(self) -> float | None:
        """Seconds until everything must be as before."""
        if self.death.full_s is None:
            return None
        return self.death.full_s + (self.engine_start_s if self.death.starts_engine else 0.0)

    @property
    def holds(self) -> bool:
        """All limits are kept."""
        away_limit, full_limit = self.death.away_s, self.full_limit_s
        away = away_limit is None or (self.away_s is not None and self.away_s <= away_limit)
        full = self.full_s is not None and (full_limit is None or self.full_s <= full_limit)
        return away and full and (self.death.may_fail or self.failed == 0)

    def line(self) -> str:
        """Of the table."""
        away = "-" if self.death.away_s is None else _seconds(self.away_s, self.death.away_s)
        return (
            f"| {self.death.name} | {away} | {_seconds(self.full_s, self.full_limit_s)} "
            f"| {self.requests} | {self.failed} | {self.restarted or 'nothing'} "
            f"| {'yes' if self.holds else 'NO'} |"
        )


def _seconds(value: float | None, limit: float | None) -> str:
    said = "never" if value is None else f"{value:.1f}"
    return said if limit is None else f"{said} ({limit:.1f})"


def _engine(replica: Mapping[str, Any]) -> int:
    """The engine's own process, below the guard that the status names."""
    return psutil.Process(replica["pid"]).children()[0].pid


def _kill_engine(_cluster: DrillCluster, replica: Mapping[str, Any]) -> None:
    os.kill(_engine(replica), signal.SIGKILL)


def _freeze_engine(_cluster: DrillCluster, replica: Mapping[str, Any]) -> None:
    os.kill(_engine(replica), signal.SIGSTOP)


def _kill_replica(_cluster: DrillCluster, replica: Mapping[str, Any]) -> None:
    os.kill(psutil.Process(replica["pid"]).ppid(), signal.SIGKILL)


def _kill_gateway(cluster: DrillCluster, _replica: Mapping[str, Any]) -> None:
    os.kill(cluster.pid_with("-m gateway"), signal.SIGKILL)


def _kill_controller(cluster: DrillCluster, _replica: Mapping[str, Any]) -> None:
    os.kill(cluster.pid_of("ControllerActor"), signal.SIGKILL)


def _kill_node(cluster: DrillCluster, replica: Mapping[str, Any]) -> None:
    cluster.kill_node(_node_of(cluster, replica))


def _node_of(cluster: DrillCluster, replica: Mapping[str, Any]) -> str:
    for name in _WORKERS:
        if replica["pid"] in cluster.pids(name):
            return name
    raise CannotRun(f"the engine of {replica['replica']} is on no worker node")


_WORKERS = ("a", "b")
DEATHS = (
    Death("engine-kill", _kill_engine, away_s=2.0),
    # A frozen engine is given 15 s to wake up before it is replaced.
    Death("engine-stop", _freeze_engine, away_s=3.5, full_s=25.0),
    Death("replica", _kill_replica, away_s=2.0),
    Death("gateway", _kill_gateway, away_s=None, starts_engine=False, may_fail=True),
    Death("controller", _kill_controller, away_s=None, full_s=20.0, starts_engine=False),
    # Ray must find out first that the node is gone, which takes three failed checks.
    Death("node", _kill_node, away_s=2.0, full_s=15.0),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the drill and print the table. Returns the exit status."""
    options = _parser().parse_args(arguments)
    known = {death.name: death for death in DEATHS}
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        _say(f"error: unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="bora-drill-") as folder:
            rows = _drill(Path(folder), [known[name] for name in names], options.clients)
    except CannotRun as error:
        _say(f"error: {error}")
        return 2
    print("\n".join([_HEADER, *(row.line() for row in rows)]))  # noqa: T201 - this is its output
    return 0 if all(row.holds for row in rows) else 1


def _drill(folder: Path, deaths: Sequence[Death], clients: int) -> list[Row]:
    engine_start_s = asyncio.run(_engine_start_s(folder))
    _say(f"an engine starts within {engine_start_s:.1f} s")
    http, grpc = free_ports(2)
    fleet = folder / "fleet.yaml"
    fleet.write_text(_FLEET.replace("HTTP", str(http)).replace("GRPC", str(grpc)))
    with drill_cluster(folder, workers=_WORKERS, slots=_SLOTS) as cluster:
        _say("Ray runs")
        cluster.bora("deploy", str(fleet), "--address", cluster.address)
        rows = []
        for death in deaths:
            _say(f"{death.name} ...")
            row = asyncio.run(
                _measure(death, cluster, f"http://127.0.0.1:{http}", clients, engine_start_s)
            )
            _say(row.line())
            if row.example:
                _say(f"    {row.example}")
            rows.append(row)
    return rows


async def _engine_start_s(folder: Path) -> float:
    """Start-up of a simulated engine alone, on this machine as busy as it is now."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "cluster.engines.sim_server", "--model", _MODEL]
    command += ["--port", str(port), "--start-delay-s", str(_ENGINE_START_S)]
    engine = Process(command, port, folder / "engine.log")
    started_s = time.perf_counter()
    try:
        await engine.start()
        return time.perf_counter() - started_s
    finally:
        engine.kill()


async def _measure(
    death: Death, cluster: DrillCluster, url: str, clients: int, engine_start_s: float
) -> Row:
    async with SteadyStreams(url, _MODEL, clients=clients) as load:
        await _settled(load, cluster)
        before = await _parts(cluster)
        replica = await _replica(cluster, load.busiest())
        killed_s = time.perf_counter()
        victim = replica["replica"] if death.away_s is not None else ""
        await asyncio.to_thread(death.kill, cluster, replica)
        full_s = await _until_full(load, cluster, killed_s, victim)
        await asyncio.sleep(_SETTLED_S)
        await load.stop()
        after = await _parts(cluster)
        failures = load.failures()
        if death.name == "node":
            await asyncio.to_thread(_replace_node, cluster)
        return Row(
            death=death,
            away_s=load.last_sent(victim, killed_s) if victim else None,
            full_s=full_s,
            requests=len(load.outcomes),
            failed=len(failures),
            restarted=_restarted(before, after),
            engine_start_s=engine_start_s,
            example=failures[0].problems[0] if failures else "",
        )


async def _settled(load: SteadyStreams, cluster: DrillCluster) -> None:
    """Every replica serves, and the controller answers."""
    deadline_s = time.perf_counter() + _WATCHED_S
    begun_s = time.perf_counter()
    while load.full_since(_REPLICAS, begun_s) is None or not load.busiest():
        _refuse_after(deadline_s, "the replicas do not all serve")
        await asyncio.sleep(0.1)
    while not await cluster.status():
        _refuse_after(deadline_s, "no controller answers")
        await asyncio.sleep(0.5)


def _refuse_after(deadline_s: float, problem: str) -> None:
    if time.perf_counter() > deadline_s:
        raise CannotRun(f"{problem} within {_WATCHED_S:g} s")


async def _until_full(
    load: SteadyStreams, cluster: DrillCluster, killed_s: float, victim: str
) -> float | None:
    """Seconds from the death until all serve again, without the victim, and the controller too."""
    answered_s: float | None = None
    while time.perf_counter() < killed_s + _WATCHED_S:
        if answered_s is None and (await cluster.status()).get("gateways"):
            answered_s = time.perf_counter()  # a controller is there, and hears gateways
        full_s = load.full_since(_REPLICAS, killed_s, without=victim)
        if full_s is not None and answered_s is not None:
            only_the_controller = not victim and full_s == killed_s
            return (answered_s if only_the_controller else full_s) - killed_s
        await asyncio.sleep(0.1)
    return None


async def _replica(cluster: DrillCluster, name: str) -> Mapping[str, Any]:
    for variant in (await cluster.status())["variants"]:
        for replica in variant["replicas"]:
            if replica["replica"] == name:
                found: dict[str, Any] = replica
                return found
    raise CannotRun(f"the status names no replica {name}")


async def _parts(cluster: DrillCluster) -> dict[str, set[int]]:
    """Process ids by what they are."""
    status = await cluster.status()
    replicas = [r for v in status.get("variants", ()) for r in v["replicas"]]
    pids = [replica["pid"] for replica in replicas if replica["state"] == "ready"]
    return {
        "engine": {_engine(replica) for replica in replicas if replica["pid"] in pids},
        "replica": {psutil.Process(pid).ppid() for pid in pids},
        "gateway": {await asyncio.to_thread(cluster.pid_with, "-m gateway")},
        "controller": {await asyncio.to_thread(cluster.pid_of, "ControllerActor")},
    }


def _restarted(before: Mapping[str, set[int]], after: Mapping[str, set[int]]) -> str:
    counts = {name: len(after[name] - pids) for name, pids in before.items()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _replace_node(cluster: DrillCluster) -> None:
    """So that later rows find two worker nodes again."""
    for name in _WORKERS:
        if not cluster.pids(name):
            cluster.start_worker(name)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help=f"of {', '.join(death.name for death in DEATHS)}")
    parser.add_argument("--clients", type=int, default=12, help="streams at a time")
    return parser


if __name__ == "__main__":
    sys.exit(main())
