"""Hosts, cables and the head die: streams go on, and what comes back finds its place."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from tests.multihost.fault_hosts import REPLICAS, WORKERS, FaultHosts, fault_hosts, why_not
from tests.multihost.host_deaths import HOST_DEATHS, HostDeath, measured
from tests.multihost.lab import OPERATOR
from tests.system.harness import eventually

pytestmark = pytest.mark.multihost
_ENGINE_START_S = 20.0  # the simulated engine's 3 s, on a machine that tests share


@pytest.fixture(scope="module")
def hosts() -> Iterator[FaultHosts]:
    """One cluster for all tests of this module: starting it takes a minute."""
    if reason := why_not():
        pytest.fail(f"{reason}: sudo make test-multihost")
    with fault_hosts() as started:
        yield started


@pytest.mark.parametrize("death", HOST_DEATHS, ids=lambda death: death.name)
def test_what_dies_costs_no_request_and_comes_back(hosts: FaultHosts, death: HostDeath):
    row = measured(death, hosts, 4, _ENGINE_START_S)

    print(row.line())  # noqa: T201 - figures of the report
    assert row.failed == 0, row.example
    assert row.wrong == ""
    assert row.full_s is not None
    assert death.starts_engine or "engine" not in row.restarted


def test_a_head_without_its_disk_learns_from_redis_what_it_serves(hosts: FaultHosts):
    engines = hosts.parts()["engine"]
    hosts.lab.power_off("head")
    shutil.rmtree(hosts.head_folder / ".local/state/bora")

    hosts.lab.boot("head")
    hosts.ray_up()

    eventually(lambda: len(ready(hosts)) == REPLICAS, 90, 1.0)
    assert fleet(hosts) == "faults"
    assert (hosts.head_folder / ".local/state/bora/context.json").exists()
    time.sleep(10)  # long enough for what is wrong to start or stop something
    assert hosts.parts()["engine"] == engines


def test_a_host_that_dies_while_the_head_is_down_is_replaced_when_it_is_back(hosts: FaultHosts):
    victim = next(iter(ready(hosts).values()))
    hosts.lab.power_off("head")
    hosts.lab.power_off(victim)
    time.sleep(5)

    hosts.lab.boot("head")
    hosts.ray_up()

    def moved() -> bool:
        places = sorted(ready(hosts).values())
        return len(places) == REPLICAS and victim not in places

    eventually(moved, 120, 1.0)
    hosts.lab.boot(victim)
    address = hosts.lab.address(victim)
    eventually(lambda: address in hosts.nodes(), 120, 1.0)


def test_ray_down_forgets_the_head_s_state_and_leaves_no_process(hosts: FaultHosts):
    assert hosts.kept() != []

    hosts.ray_down()

    assert hosts.kept() == []
    for host in ("head", "front", *WORKERS):
        assert hosts.lab.processes(host) == []


def ready(hosts: FaultHosts) -> dict[str, str]:
    return hosts.lab.inside(OPERATOR, hosts.ready)


def fleet(hosts: FaultHosts) -> str:
    return str(hosts.lab.inside(OPERATOR, hosts.status)["fleet"])
