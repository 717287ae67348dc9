"""`bora models`, `bora gpus`, `bora plan`: what can be known without a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster import context
from cluster.calibration_file import calibrated_catalogue
from cluster.cli.render import page_console, plan_page
from cluster.control_api import ControlClient
from cluster.local_inventory import local_inventory
from cluster.models import catalogue_for
from placement.canary import merged, with_canaries
from placement.catalogue import Catalogue, load_catalogue
from placement.errors import ConfigError, UnknownName
from placement.fleet import FleetSpec
from placement.inventory import Inventory
from placement.parameters import count_parameters
from placement.plan import Plan
from placement.planner import make_plan
from placement.spec import dump_yaml, load_yaml, place

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(models)
    app.command()(gpus)
    app.command()(plan)


def models(*, json_: Json = False) -> None:
    """The models in the catalogue."""
    entries = load_catalogue().models.values()
    if json_:
        print(json.dumps([entry.model_dump(mode="json") for entry in entries]))  # noqa: T201
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
        print(json.dumps([entry.model_dump(mode="json") for entry in entries]))  # noqa: T201
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


def plan(
    fleet: Path,
    *,
    inventory: Annotated[
        Path | None,
        typer.Option(help="Pools to plan for; without it the running cluster, or this machine."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan as YAML.")] = None,
    json_: Json = False,
) -> None:
    """Solve a fleet on an inventory; nothing is started."""
    answer = solve(fleet, inventory)
    if out is not None:
        _write(out, dump_yaml(answer))
    if json_:
        print(answer.model_dump_json())  # noqa: T201
    else:
        page_console().print(plan_page(answer))
    sys.exit(3 if answer.status == "infeasible" else 0)


def solve(fleet: Path, inventory: Path | None) -> Plan:
    """The plan for a fleet file on an inventory file, the running cluster, or this machine."""
    return solve_on(fleet, inventory_for(inventory, calibrated_catalogue()))


def solve_on(fleet: Path, offered: Inventory) -> Plan:
    """The plan for a fleet file on an inventory.

    Raises:
        ConfigError: the file is wrong, or names a model, pool or GPU type that is not there.
    """
    spec = load_yaml(fleet, FleetSpec)
    try:
        planned = with_canaries(spec)
        catalogue = catalogue_for(planned, calibrated_catalogue())
    except UnknownName as error:
        asked = [model.model for model in spec.models]
        if error.name not in asked:
            raise
        where = place(fleet, "models", asked.index(error.name), "model")
        raise ConfigError(f"{where}: {error}") from None
    problems = _unknown_names(fleet, spec, offered, catalogue)
    if problems:
        raise ConfigError("\n".join(problems))
    return merged(make_plan(planned, offered, catalogue), spec)


def inventory_for(path: Path | None, catalogue: Catalogue) -> Inventory:
    """From `path`; else from the running cluster; else this machine.

    Raises:
        ConfigError: the file is wrong, or names a GPU type that the catalogue does not have.
    """
    if path is not None:
        return _inventory_in(path, catalogue)
    running = context.find()
    if running is not None and running.controller_url:
        return ControlClient(running.controller_url, running.token).inventory()
    return local_inventory(catalogue)


def _inventory_in(path: Path, catalogue: Catalogue) -> Inventory:
    inventory = load_yaml(path, Inventory)
    problems = [
        f"{place(path, 'pools', index, 'gpu')}: {problem}"
        for index, pool in enumerate(inventory.pools)
        if (problem := _unknown_gpu(pool.gpu, catalogue))
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return inventory


def _unknown_names(
    fleet: Path, spec: FleetSpec, offered: Inventory, catalogue: Catalogue
) -> list[str]:
    """A line for each pool and GPU type that the fleet names and nobody knows."""
    pools = [pool.name for pool in offered.pools]
    problems = []
    for index, model in enumerate(spec.models):
        for number, pool in enumerate(model.pools or ()):
            if pool not in pools:
                where = place(fleet, "models", index, "pools", number)
                problems.append(f"{where}: {UnknownName('pool', pool, pools)}")
        if model.simulate_gpu and (problem := _unknown_gpu(model.simulate_gpu, catalogue)):
            problems.append(f"{place(fleet, 'models', index, 'simulate_gpu')}: {problem}")
    return problems


def _unknown_gpu(name: str, catalogue: Catalogue) -> str:
    """What is wrong with this GPU type; empty: nothing."""
    try:
        catalogue.gpu(name)
    except UnknownName as error:
        return str(error)
    return ""


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written: {error.strerror}") from error


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
