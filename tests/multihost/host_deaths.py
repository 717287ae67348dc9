"""Hosts and cables die under streams: the rows of the fault table that need hosts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loadtests.fault_table import Limits, Row, replica_of, restarted, settled, until_full
from loadtests.steady_streams import SteadyStreams
from tests.multihost.fault_hosts import FRONT, HOSTS, MODEL, REPLICAS, FaultHosts
from tests.multihost.lab import OPERATOR

_SETTLED_S = 3.0
_NODES_S = 120.0  # a host that comes back is started over ssh
_HOME_S = 60.0  # 20 s pass before a move begins, and an engine starts
_MENDED_S = 150.0  # `ray up` alone takes half a minute on a busy machine
_HEAD_OFF_S = 75.0  # by itself a Ray node gives up after 60 s

Act = Callable[[FaultHosts, str], None]


@dataclass(frozen=True, slots=True)
class HostDeath(Limits):
    """What dies. `strike` and `mend` get the host of the replica that is hit.

    `lasts_s`: mended after so long, and full capacity is counted from then on; None: mended in the
    end, when capacity is full without it.
    """

    strike: Act = field(kw_only=True)
    mend: Act = field(kw_only=True)
    lasts_s: float | None = None


def _power_off(hosts: FaultHosts, host: str) -> None:
    hosts.lab.power_off(host)


def _boot(hosts: FaultHosts, host: str) -> None:
    hosts.lab.boot(host)


def _unplug(hosts: FaultHosts, host: str) -> None:
    hosts.lab.unplug(host)


def _plug(hosts: FaultHosts, host: str) -> None:
    hosts.lab.plug(host)


def _part(hosts: FaultHosts, host: str) -> None:
    hosts.lab.part(FRONT, host)


def _join(hosts: FaultHosts, host: str) -> None:
    hosts.lab.join(FRONT, host)


def _power_off_head(hosts: FaultHosts, _host: str) -> None:
    hosts.lab.power_off("head")


def _boot_head(hosts: FaultHosts, _host: str) -> None:
    hosts.lab.boot("head")
    hosts.ray_up()


def _kill_gcs(hosts: FaultHosts, _host: str) -> None:
    hosts.lab.run("head", "pkill -KILL gcs_server")  # of that host's process table


def _ray_up(hosts: FaultHosts, _host: str) -> None:
    hosts.ray_up()


_AWAY_S = 3.5  # the gateways' own checks: nobody tells them
# Ray finds out after 9 s (three checks of 3 s) that a silent node is gone.
_GONE_S = 20.0
HOST_DEATHS = (
    HostDeath("host", _AWAY_S, _GONE_S, strike=_power_off, mend=_boot),
    HostDeath("host-cut-off", _AWAY_S, _GONE_S, strike=_unplug, mend=_plug),
    HostDeath(
        "gateway-to-host",
        _AWAY_S,
        starts_engine=False,
        strike=_part,
        mend=_join,
        lasts_s=15.0,
    ),
    HostDeath("gcs", None, 60.0, starts_engine=False, strike=_kill_gcs, mend=_ray_up, lasts_s=5.0),
    HostDeath(
        "head",
        None,
        60.0,
        starts_engine=False,
        strike=_power_off_head,
        mend=_boot_head,
        lasts_s=_HEAD_OFF_S,
    ),
)


def measured(death: HostDeath, hosts: FaultHosts, clients: int, engine_start_s: float) -> Row:
    """Its row. Streams come from the operator's host, through the gateway of another one."""
    return hosts.lab.inside(
        OPERATOR, lambda: asyncio.run(_measure(death, hosts, clients, engine_start_s))
    )


async def _measure(death: HostDeath, hosts: FaultHosts, clients: int, start_s: float) -> Row:
    async def status() -> Mapping[str, Any]:
        return await asyncio.to_thread(hosts.status)

    async def whole() -> Mapping[str, Any]:
        return await status() if len(await asyncio.to_thread(hosts.ready)) == REPLICAS else {}

    async with SteadyStreams(hosts.url, MODEL, clients=clients) as load:
        await _at_home(status)
        await settled(load, whole, REPLICAS)
        before = await asyncio.to_thread(hosts.parts)
        replica = await replica_of(status, load.busiest())
        victim, host = (replica["replica"] if death.away_s is not None else ""), replica["node"]
        struck_s = since_s = time.perf_counter()
        await asyncio.to_thread(death.strike, hosts, host)
        if death.lasts_s is None:
            full_s = await until_full(load, whole, REPLICAS, since_s, victim)
            mended_s = time.perf_counter()
            await asyncio.to_thread(death.mend, hosts, host)
        else:
            await asyncio.sleep(death.lasts_s)
            since_s = mended_s = time.perf_counter()
            await asyncio.to_thread(death.mend, hosts, host)
            full_s = await until_full(load, whole, REPLICAS, since_s, "", watched_s=_MENDED_S)
        nodes = await asyncio.to_thread(_all_nodes, hosts)
        await asyncio.sleep(_SETTLED_S)
        await load.stop()
        failures = load.failures()
        after = await asyncio.to_thread(hosts.parts)
        return Row(
            death=death,
            away_s=load.last_sent(victim, struck_s, mended_s) if victim else None,
            full_s=full_s,
            requests=len(load.outcomes),
            failed=len(failures),
            restarted=restarted(before, after),
            engine_start_s=start_s,
            example=failures[0].problems[0] if failures else "",
            wrong=_wrong(after, await asyncio.to_thread(hosts.ready), nodes=nodes),
        )


async def _at_home(status: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    """No replica is about to move to its planned node, which starts an engine and ends another.

    One that stays beside the plan for longer has moved some minutes ago, and does not again so soon.
    """
    deadline_s = time.perf_counter() + _HOME_S
    while any(variant["misplaced"] for variant in (await status()).get("variants", ())):
        if time.perf_counter() > deadline_s:
            return
        await asyncio.sleep(1.0)


def _all_nodes(hosts: FaultHosts) -> bool:
    """Whether every host is a node again."""
    deadline_s = time.monotonic() + _NODES_S
    while len(hosts.nodes()) < len(HOSTS) - 1:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(1.0)
    return True


def _wrong(parts: Mapping[str, set[str]], ready: Mapping[str, str], *, nodes: bool) -> str:
    """Each GPU has one engine, which the controller knows, and every host is back."""
    engines = sorted(engine.split()[0] for engine in parts["engine"])
    if engines != sorted(ready.values()) or len(engines) != REPLICAS:
        return f"engines on {', '.join(engines)}, replicas on {', '.join(sorted(ready.values()))}"
    if len(set(engines)) != len(engines):
        return f"two engines on a host with one GPU: {', '.join(engines)}"
    return "" if nodes else f"not every host is a Ray node again after {_NODES_S:g} s"
