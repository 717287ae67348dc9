"""Commands on a running fleet: deploy, status, scale, delete, down."""

from __future__ import annotations

import os
import secrets
import signal
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster import context
from cluster.calibration_file import calibrated_catalogue
from cluster.cli.catalogue import Json
from cluster.cli.inventory_check import probed_nodes, require_truth
from cluster.cli.planning import solve, solve_on
from cluster.cli.render import feasible, page_console
from cluster.cli.status_page import status_page
from cluster.cli.waiting import wait_until_ready
from cluster.context import Context
from cluster.control_api import ControlClient
from cluster.errors import ClusterError, EngineFailed
from cluster.facts_file import FACTS_FILE, keep_facts
from cluster.gateway_ports import checked_ports
from cluster.local_ray import remove_tmpdir, use_own_token
from cluster.models import pinned
from cluster.processes import free_ports
from placement.errors import UnknownName
from placement.found_inventory import with_findings
from placement.inventory import Inventory
from placement.spec import load_yaml

DOWN_TIMEOUT_S = 120.0


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (deploy, status, scale, delete, down):
        app.command()(command)


def deploy(
    fleet: Path,
    *,
    inventory: Annotated[Path | None, typer.Option(help="Instead of what Ray reports.")] = None,
    address: Annotated[
        str | None, typer.Option(help="GCS address of a Ray cluster that has no bora yet.")
    ] = None,
    trust_inventory: Annotated[
        bool, typer.Option(help="Deploy though hosts are not what was declared.")
    ] = False,
) -> None:
    """Serve this fleet on the running cluster; models that it does not name are stopped."""
    console = page_console(stderr=True)
    running = context.find()
    if running is None and address is not None:
        _install_and_deploy(address, fleet, inventory, console, trust_inventory=trust_inventory)
        return
    client = _client(running or context.require())
    nodes = probed_nodes(client, console)
    before = client.plan()
    plan = pinned(feasible(solve(fleet, inventory, before), console), before)
    declared = nodes.declared if inventory is None else load_yaml(inventory, Inventory)
    if declared is not None and not trust_inventory:
        require_truth(plan, declared, nodes.nodes, calibrated_catalogue(), console)
    if before is not None and before.gateway != plan.gateway:
        console.print(
            "note: the gateway keeps its address and its `auth` until `bora down`", markup=False
        )
    try:
        client.apply(plan)
        wait_until_ready(client, plan, console, still_up=lambda: True)
    except (EngineFailed, KeyboardInterrupt):
        client.apply(before or plan.model_copy(update={"variants": ()}))
        console.print("the deployment was taken back; what served before serves on", markup=False)
        raise
    console.print(status_page(client.status()))


def status(
    model: Annotated[str | None, typer.Argument(help="Only this one, with all replicas.")] = None,
    *,
    replicas: Annotated[bool, typer.Option("--replicas", help="All, however many.")] = False,
    json_: Json = False,
) -> None:
    """What runs: variants, replicas, memory planned and actual, load, last events."""
    current = _client(context.require()).status()
    if model is not None:
        chosen = [each for each in current.variants if model in (each.model, *each.aliases)]
        if not chosen:
            raise UnknownName("model", model, {each.model for each in current.variants})
        current = current.model_copy(update={"variants": tuple(chosen)})
    if json_:
        print(current.model_dump_json())
    else:
        every_replica = replicas or model is not None
        page_console().print(status_page(current, every_replica=every_replica))


def scale(model: str, replicas: Annotated[int, typer.Argument(min=0)]) -> None:
    """Set a model's replica count until its load asks for another.

    Of a model whose prompts are read on replicas of their own: how many answer; those follow.
    """
    _client(context.require()).scale(model, replicas)


def delete(model: str) -> None:
    """Stop a model; its running requests may finish."""
    _client(context.require()).delete(model)


def down() -> None:
    """Stop what `bora up` or `bora deploy` started, and nothing else."""
    console = page_console(stderr=True)
    running = context.last()
    if running is None:
        console.print("nothing of bora runs here", markup=False)
        return
    if running.supervised:
        _stop_supervisor(running, console)
    elif running.supervisor_pid:
        # That `bora up` was killed: its guard has ended everything, only files are left.
        remove_tmpdir(running.ray_tmpdir)
    else:
        _uninstall(running, console)
    context.forget()
    console.print("stopped", markup=False)


def _install_and_deploy(
    address: str, fleet: Path, inventory: Path | None, console: Console, *, trust_inventory: bool
) -> None:
    """Controller and gateway on a Ray cluster that somebody else started, then the fleet.

    Whatever goes wrong on the way, nothing is left there.
    """
    use_own_token()  # before Ray is imported: it reads the environment then
    from cluster import bootstrap  # noqa: PLC0415 - imports Ray, which takes a second

    bootstrap.connect(address)
    declared = bootstrap.inventory() if inventory is None else load_yaml(inventory, Inventory)
    found = bootstrap.probe_nodes(lambda text: console.print(f"probed {text}", markup=False))
    offered = with_findings(declared, found) if inventory is None else declared
    plan = pinned(feasible(solve_on(fleet, offered), console))
    if not trust_inventory:
        require_truth(plan, declared, found, calibrated_catalogue(), console)
    plan = plan.model_copy(update={"gateway": checked_ports(plan.gateway)})
    host = bootstrap.node_address()
    [port] = free_ports(1, host)
    url, token = f"http://{host}:{port}", secrets.token_urlsafe(32)
    run_dir = context.made_state_dir() / "run"
    (run_dir / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
    bootstrap.require_none()
    keep_facts(run_dir.parent / FACTS_FILE, found)
    try:
        bootstrap.start(
            run_dir=run_dir,
            token=token,
            control=(host, port),
            gateway=plan.gateway,
            engine_host=None,
        )
        client = ControlClient(url, token)
        client.apply(plan)
        wait_until_ready(client, plan, console, still_up=lambda: True)
    except BaseException:  # Ctrl-C too
        bootstrap.stop()
        console.print("taken back: nothing of bora is left on that cluster", markup=False)
        raise
    context.save(
        Context(run_dir=str(run_dir), ray_address=address, controller_url=url, token=token)
    )
    console.print(status_page(client.status()))
    bootstrap.disconnect()


def _uninstall(running: Context, console: Console) -> None:
    use_own_token()  # before Ray is imported: it reads the environment then
    from cluster import bootstrap  # noqa: PLC0415 - imports Ray, which takes a second

    if not bootstrap.listens(running.ray_address):
        console.print(f"the Ray cluster at {running.ray_address} is gone already", markup=False)
        return
    bootstrap.connect(running.ray_address)
    bootstrap.stop()
    bootstrap.disconnect()


def _stop_supervisor(running: Context, console: Console) -> None:
    console.print("stopping: running requests may finish", markup=False)
    os.kill(running.supervisor_pid, signal.SIGTERM)
    deadline = time.monotonic() + DOWN_TIMEOUT_S
    while running.supervised:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"`bora up` (process {running.supervisor_pid}) did not end within "
                f"{DOWN_TIMEOUT_S:.0f} s; its terminal shows why. Ending it by kill -9 is safe: "
                f"what it started ends with it"
            )
        time.sleep(0.1)


def _client(running: Context) -> ControlClient:
    return ControlClient(running.controller_url, running.token)
