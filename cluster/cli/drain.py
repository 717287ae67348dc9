"""`bora drain`: empty a replica or a node, without losing a request."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from cluster import context
from cluster.cli.render import page_console
from cluster.control_api import ControlClient
from cluster.errors import ClusterError
from cluster.messages import Drained, FleetStatus

PERIOD_S = 0.5
_BEYOND_S = 60.0  # that an engine may take to end


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(drain)


def drain(
    target: Annotated[
        str, typer.Argument(help="A replica's id, or a node, as `bora status` names them.")
    ],
    *,
    timeout_s: Annotated[
        float, typer.Option(min=0.0, help="Then what still runs there is cut off.")
    ] = 600.0,
) -> None:
    """Send nothing more there, let streams finish, stop it; its replicas start again elsewhere.

    A node's replicas serve on until their successors elsewhere are ready, at most `--timeout-s`.
    """
    console = page_console(stderr=True)
    running = context.require()
    client = ControlClient(running.controller_url, running.token)
    drained = client.drain(target, timeout_s)
    deadline = time.monotonic() + timeout_s + _BEYOND_S
    said = -1
    while left := _left(drained, client.status()):
        if left != said:
            said = left
            console.print(f"{target}: {left} replica(s) left", markup=False)
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{target}: {left} replica(s) are still there; `bora status` shows what they do"
            )
        time.sleep(PERIOD_S)
    console.print(f"{target}: empty", markup=False)


def _left(drained: Drained, status: FleetStatus) -> int:
    return sum(
        replica.replica in drained.replicas or replica.node_id == drained.node_id
        for variant in status.variants
        for replica in variant.replicas
    )
