"""`bora events`: what happened to the fleet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cluster import context
from cluster.cli.render import page_console
from cluster.control_api import ControlClient
from cluster.errors import ClusterUnreachable
from cluster.messages import Event, EventList

POLL_S = 0.5


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(events)


def events(
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they happen.")] = False,
    model: Annotated[str | None, typer.Option(help="Of this model only.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="The last so many.")] = 50,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON document; with --follow one a line.")
    ] = False,
) -> None:
    """What happened: replicas, scaling, deployments, nodes, warnings; with node and reason."""
    running = context.require()
    client = ControlClient(running.controller_url, running.token)
    known = client.events().events
    shown = [event for event in known if model in (None, event.model)][-lines:]
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(client, shown, model, json_=json_)
    elif json_:
        print(EventList(events=tuple(shown)).model_dump_json())
    else:
        page_console().print(event_table(shown))


def event_table(shown: Sequence[Event]) -> Table:
    """One row an event, the oldest first; times in UTC."""
    table = Table("time (UTC)", "event", "model", "node", "what", "reason", box=None)
    for event in shown:
        own = (event.kind, event.model, event.node, event.text, event.reason)
        table.add_row(_time(event), *map(Text, own))
    return table


def _follow(
    client: ControlClient, shown: Sequence[Event], model: str | None, *, json_: bool
) -> None:
    """For ever; while no controller answers, gateways and engines serve on, and it is asked again."""
    last, silent = max((event.number for event in shown), default=0), False
    while True:
        for event in shown:
            last = max(last, event.number)
            if model in (None, event.model):
                print(event.model_dump_json() if json_ else _line(event))
        sys.stdout.flush()
        time.sleep(POLL_S)
        try:
            if silent and not any(event.number >= last for event in client.events().events):
                last = 0  # a new head began to count anew
            shown, silent = client.events(last).events, False
        except ClusterUnreachable as error:
            shown = ()
            if not silent:
                print(f"{error}; asking again", file=sys.stderr, flush=True)
            silent = True


def _line(event: Event) -> str:
    where = " ".join(filter(None, (event.model, event.node)))
    reason = f" ({event.reason})" if event.reason and event.reason not in event.text else ""
    return f"{_time(event)}  {event.kind:<17} {where}: {event.text}{reason}"


def _time(event: Event) -> str:
    return datetime.fromtimestamp(event.at_s, UTC).strftime("%m-%d %H:%M:%S")
