"""`bora`: the command line. Commands live beside this file; errors become exit codes here."""

from __future__ import annotations

import sys

import typer

from cluster.cli import (
    catalogue,
    cluster,
    doctor,
    events,
    fit,
    fleet,
    gateway,
    keys,
    logs,
    planning,
    probe,
    up,
)
from cluster.cli.render import page_console
from cluster.errors import ClusterError
from placement.errors import PlacementError

app = typer.Typer(
    name="bora",
    help="Serve the Mistral family on a mixed pool of GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (
    *(up, catalogue, planning, fit, fleet, logs, events, probe, doctor),
    *(gateway, keys, cluster),
):
    module.register(app)


def main() -> None:
    """Run the command line; exit codes as in the README."""
    try:
        app()
    except (PlacementError, ClusterError) as error:
        page_console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False
        )
        sys.exit(error.exit_code)
