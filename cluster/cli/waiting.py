"""Wait for replicas, and show what they are doing meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.control_api import ControlClient
from cluster.errors import ClusterError, EngineFailed
from cluster.messages import FleetStatus
from placement.plan import Plan

PERIOD_S = 0.3


def wait_until_ready(
    client: ControlClient, plan: Plan, console: Console, *, still_up: Callable[[], bool]
) -> None:
    """Return when every variant of `plan` has the replicas it starts with.

    Raises:
        EngineFailed: an engine (or the gateway) ended; with the end of its log.
        ClusterError: `still_up` says no.
    """
    wanted = {variant.variant: variant.replicas for variant in plan.variants}
    started_s = time.monotonic()
    said: set[tuple[str, str]] = set()
    with Live(console=console, transient=True, refresh_per_second=4) as live:
        while True:
            status = client.status()
            _raise_failures(status)
            if status.gateways and _all_ready(status, wanted):
                return
            if not still_up():
                raise ClusterError("Ray ended while the engines were loading")
            if console.is_terminal:
                live.update(_progress(status, wanted))
            else:
                _say_new_stages(status, console, said, started_s)
            time.sleep(PERIOD_S)


def _all_ready(status: FleetStatus, wanted: dict[str, int]) -> bool:
    """As many as planned; fewer where the fleet had been scaled below that before."""
    return all(
        variant.ready >= min(wanted.get(variant.variant, 0), variant.wanted)
        for variant in status.variants
    )


def _raise_failures(status: FleetStatus) -> None:
    if status.gateway_failure and not status.gateways:
        raise EngineFailed(f"the gateway does not start:\n{status.gateway_failure}")
    for variant in status.variants:
        if variant.failure and variant.ready == 0:
            raise EngineFailed(
                f"an engine of {variant.model} ended while it loaded; the end of its log:\n"
                f"{variant.failure}"
            )


def _progress(status: FleetStatus, wanted: dict[str, int]) -> Table:
    table = Table("model", "variant", "ready", "doing", "seconds", box=None)
    for variant in status.variants:
        busy = [replica for replica in variant.replicas if replica.state != "ready"]
        idle = variant.rollout or ("" if variant.ready else "waiting for Ray")
        doing = busy[0].stage if busy else idle
        seconds = f"{busy[0].age_s:.0f}" if busy else ""
        ready = f"{variant.ready}/{wanted.get(variant.variant, variant.wanted)}"
        table.add_row(variant.model, variant.variant, ready, doing, seconds)
    return table


def _say_new_stages(
    status: FleetStatus, console: Console, said: set[tuple[str, str]], started_s: float
) -> None:
    """Without a terminal: a line whenever a replica comes to another stage."""
    for variant in status.variants:
        stages = [(each.replica, each.stage or each.state) for each in variant.replicas]
        if variant.rollout:
            stages.append((variant.variant, f"roll-out: {variant.rollout}"))
        for who, stage in stages:
            if (who, stage) not in said:
                said.add((who, stage))
                seconds = time.monotonic() - started_s
                console.print(f"{seconds:6.1f} s  {variant.model}: {stage}", markup=False)
