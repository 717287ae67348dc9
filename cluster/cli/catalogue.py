"""`bora models`, `bora gpus`: what the catalogue knows."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from cluster.cli.cached import show_cached
from cluster.cli.render import page_console
from placement.catalogue import load_catalogue
from placement.parameters import count_parameters

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(models)
    app.command()(gpus)


def models(
    *,
    cached: Annotated[
        bool, typer.Option("--cached", help="Instead: what this host has downloaded.")
    ] = False,
    json_: Json = False,
) -> None:
    """The models in the catalogue."""
    if cached:
        show_cached(json_=json_)
        return
    entries = load_catalogue().models.values()
    if json_:
        print(json.dumps([entry.model_dump(mode="json") for entry in entries]))
        return
    table = Table("model", "parameters", "active", "context", "checkpoints", "licence", box=None)
    for entry in entries:
        count = count_parameters(entry.architecture)
        table.add_row(
            entry.name,
            _billions(count.total),
            _billions(count.active),
            f"{entry.context:,}",
            ", ".join(checkpoint.precision for checkpoint in entry.checkpoints),
            entry.licence,
        )
    page_console().print(table)


def gpus(*, json_: Json = False) -> None:
    """The GPU types in the catalogue."""
    entries = load_catalogue().gpus.values()
    if json_:
        print(json.dumps([entry.model_dump(mode="json") for entry in entries]))
        return
    table = Table(
        "GPU", "memory GiB", "GB/s", "bf16 TFLOPS", "NVLink GB/s", "P2P", "USD/h", box=None
    )
    for gpu in entries:
        table.add_row(
            gpu.name,
            f"{gpu.memory_bytes / 2**30:.2f}" if gpu.memory_bytes else "-",
            f"{gpu.memory_bandwidth_bytes_per_s / 1e9:.0f}",
            f"{gpu.bf16_flops / 1e12:.0f}",
            f"{gpu.nvlink_bytes_per_s / 1e9:.0f}" if gpu.nvlink_bytes_per_s else "-",
            "yes" if gpu.peer_to_peer else "no",
            "-" if gpu.price_per_hour is None else f"{gpu.price_per_hour:.2f}",
        )
    page_console().print(table)


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
