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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from loadtests.drill_cluster_processes import DrillCluster, drill_cluster
from loadtests.drill_processes import Process, free_ports
from loadtests.fault_table import (
    HEADER,
    Limits,
    Row,
    replica_of,
    restarted,
    settled,
    until_full,
)
from loadtests.processes import CannotRun
from loadtests.steady_streams import SteadyStreams

_MODEL = "chat"
_REPLICAS = 2
_SLOTS = 3  # of each worker: the other one has room for all replicas
ENGINE_DELAY_S = 3.0  # that the simulated engine takes to load
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
    engine_args: [--sim-speed=2, --sim-start-delay-s={ENGINE_DELAY_S:g}]
gateway: {{http_port: HTTP, grpc_port: GRPC}}
"""


@dataclass(frozen=True, slots=True)
class Death(Limits):
    """What dies: `kill` gets the cluster and the replica whose engine, process or node it hits."""

    kill: Callable[[DrillCluster, Mapping[str, Any]], None] = field(kw_only=True)


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
    Death("engine-kill", kill=_kill_engine, away_s=2.0),
    # A frozen engine is given 15 s to wake up before it is replaced.
    Death("engine-stop", kill=_freeze_engine, away_s=3.5, full_s=25.0),
    Death("replica", kill=_kill_replica, away_s=2.0),
    Death("gateway", kill=_kill_gateway, away_s=None, starts_engine=False, may_fail=True),
    Death("controller", kill=_kill_controller, away_s=None, full_s=20.0, starts_engine=False),
    # Ray must find out first that the node is gone, which takes three failed checks.
    Death("node", kill=_kill_node, away_s=2.0, full_s=15.0),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the drill and print the table. Returns the exit status."""
    options = parser(__doc__ or "", [death.name for death in DEATHS]).parse_args(arguments)
    try:
        rows = drill(options.only, options.clients)
    except CannotRun as error:
        say(f"error: {error}")
        return 2
    print("\n".join([HEADER, *(row.line() for row in rows)]))  # noqa: T201 - this is its output
    return 0 if all(row.holds for row in rows) else 1


def drill(only: Collection[str], clients: int) -> list[Row]:
    """The rows of those deaths that are in `only`.

    Raises:
        CannotRun: no cluster comes up here.
    """
    deaths = [death for death in DEATHS if death.name in only]
    if not deaths:
        return []
    with tempfile.TemporaryDirectory(prefix="bora-drill-") as folder:
        return _drill(Path(folder), deaths, clients)


def _drill(folder: Path, deaths: Sequence[Death], clients: int) -> list[Row]:
    http, grpc = free_ports(2)
    fleet = folder / "fleet.yaml"
    fleet.write_text(_FLEET.replace("HTTP", str(http)).replace("GRPC", str(grpc)))
    with drill_cluster(folder, workers=_WORKERS, slots=_SLOTS) as cluster:
        say("Ray runs")
        cluster.bora("deploy", str(fleet), "--address", cluster.address)
        rows = []
        for death in deaths:
            start_s = asyncio.run(engine_start_s(folder))
            say(f"{death.name} ... (an engine alone starts within {start_s:.1f} s now)")
            url = f"http://127.0.0.1:{http}"
            rows.append(asyncio.run(_measure(death, cluster, url, clients, start_s)))
            say(rows[-1].line())
            if rows[-1].example:
                say(f"    {rows[-1].example}")
    return rows


async def engine_start_s(folder: Path) -> float:
    """Start-up of a simulated engine alone, on this machine as busy as it is now; seconds."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "cluster.engines.sim_server", "--model", _MODEL]
    command += ["--port", str(port), "--start-delay-s", str(ENGINE_DELAY_S)]
    engine = Process(command, port, folder / "engine.log")
    started_s = time.perf_counter()
    try:
        await engine.start()
        return time.perf_counter() - started_s
    finally:
        engine.kill()


async def _measure(
    death: Death, cluster: DrillCluster, url: str, clients: int, start_s: float
) -> Row:
    async with SteadyStreams(url, _MODEL, clients=clients) as load:
        await settled(load, cluster.status, _REPLICAS)
        before = await _parts(cluster)
        replica = await replica_of(cluster.status, load.busiest())
        killed_s = time.perf_counter()
        victim = replica["replica"] if death.away_s is not None else ""
        await asyncio.to_thread(death.kill, cluster, replica)
        full_s = await until_full(load, cluster.status, _REPLICAS, killed_s, victim)
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
            restarted=restarted(before, after),
            engine_start_s=start_s,
            example=failures[0].problems[0] if failures else "",
        )


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


def _replace_node(cluster: DrillCluster) -> None:
    """So that later rows find two worker nodes again."""
    for name in _WORKERS:
        if not cluster.pids(name):
            cluster.start_worker(name)


def say(text: str) -> None:
    """Progress, beside the output."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


def parser(about: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """Options of a drill of the deaths with these names."""
    made = argparse.ArgumentParser(description=about.splitlines()[0])

    def some(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := [name for name in wanted if name not in names]:
            message = f"unknown: {', '.join(unknown)}; known: {', '.join(names)}"
            raise argparse.ArgumentTypeError(message)
        return wanted

    made.add_argument("--only", type=some, default=list(names), help=f"of {', '.join(names)}")
    made.add_argument("--clients", type=int, default=12, help="streams at a time")
    return made


if __name__ == "__main__":
    sys.exit(main())
