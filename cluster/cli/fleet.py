"""Commands on a running fleet: deploy, status, scale, delete, logs, down."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster import context
from cluster.cli.catalogue import Json, solve
from cluster.cli.render import page_console, plan_page, status_page
from cluster.cli.waiting import wait_until_ready
from cluster.context import Context, state_dir
from cluster.control_api import ControlClient
from cluster.errors import ClusterError, EngineFailed
from cluster.gateway_host import checked_ports
from cluster.processes import free_ports, tail
from placement.errors import DoesNotFit, UnknownName
from placement.fleet import FleetSpec, GatewaySpec
from placement.spec import load_yaml

DOWN_TIMEOUT_S = 120.0


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (deploy, status, scale, delete, logs, down):
        app.command()(command)


def deploy(
    fleet: Path,
    *,
    inventory: Annotated[Path | None, typer.Option(help="Instead of what Ray reports.")] = None,
    address: Annotated[
        str | None, typer.Option(help="GCS address of a Ray cluster that has no bora yet.")
    ] = None,
) -> None:
    """Serve this fleet on the running cluster; models that it does not name are stopped."""
    console = page_console(stderr=True)
    running = context.find()
    if running is None and address is not None:
        running = _install(address, checked_ports(load_yaml(fleet, FleetSpec).gateway))
    client = _client(running or context.require())
    plan = solve(fleet, inventory)
    if plan.status == "infeasible":
        console.print(plan_page(plan))
        raise DoesNotFit("the fleet does not fit; nothing was changed. The reasons are above")
    before = client.plan()
    client.apply(plan)
    try:
        wait_until_ready(client, plan, console, still_up=lambda: True)
    except EngineFailed:
        client.apply(before or plan.model_copy(update={"variants": ()}))
        console.print("the deployment was taken back; what served before serves on", markup=False)
        raise
    console.print(status_page(client.status()))


def status(*, json_: Json = False) -> None:
    """What runs: variants, replicas, memory planned and actual, load, last events."""
    current = _client(context.require()).status()
    if json_:
        print(current.model_dump_json())  # noqa: T201
    else:
        page_console().print(status_page(current))


def scale(model: str, replicas: Annotated[int, typer.Argument(min=0)]) -> None:
    """Set a model's replica count until its load asks for another."""
    _client(context.require()).scale(model, replicas)


def delete(model: str) -> None:
    """Stop a model; its running requests may finish."""
    _client(context.require()).delete(model)


def logs(
    target: Annotated[
        str, typer.Argument(help="MODEL, MODEL/REPLICA, `gateway`, `controller` or `ray`.")
    ],
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1)] = 100,
) -> None:
    """The output of a model's engines, of the gateway or of Ray."""
    running = context.require()
    files = _log_files(running, target)
    many = len(files) > 1
    for file in files:
        if many:
            print(f"==> {file} <==")  # noqa: T201
        print(tail(file, lines))  # noqa: T201
    if follow:
        _follow(files[-1])


def down() -> None:
    """Stop what `bora up` or `bora deploy` started, and nothing else."""
    console = page_console(stderr=True)
    running = context.find()
    if running is None:
        console.print("nothing of bora runs here", markup=False)
        return
    if running.supervised:
        _stop_supervisor(running, console)
    elif running.supervisor_pid == 0:
        _uninstall(running)
    # Otherwise `bora up` was killed: its guard has ended everything, only the context is left.
    context.forget()
    console.print("stopped", markup=False)


def _install(address: str, gateway: GatewaySpec) -> Context:
    """Controller and gateway on a Ray cluster that somebody else started."""
    from cluster import bootstrap  # noqa: PLC0415 - imports Ray, which takes seconds

    run_dir = state_dir() / "run"
    (run_dir / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
    bootstrap.connect(address)
    host = bootstrap.node_address()
    [port] = free_ports(1, host)
    token = secrets.token_urlsafe(32)
    bootstrap.start(
        run_dir=run_dir, token=token, control=(host, port), gateway=gateway, engine_host=None
    )
    bootstrap.disconnect()
    made = Context(
        ray_address=address,
        ray_tmpdir="",
        controller_url=f"http://{host}:{port}",
        token=token,
        http_url=f"http://{gateway.host}:{gateway.http_port}",
        grpc_address=f"{gateway.host}:{gateway.grpc_port}",
        run_dir=str(run_dir),
    )
    context.save(made)
    return made


def _uninstall(running: Context) -> None:
    from cluster import bootstrap  # noqa: PLC0415 - imports Ray, which takes seconds

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


def _log_files(running: Context, target: str) -> list[Path]:
    folder = Path(running.run_dir) / "logs"
    if target in ("controller", "gateway", "ray"):
        return [folder / f"{target}.log"]
    model, _, replica = target.partition("/")
    if not _models_of(running, target):
        found = [file for file in _replica_logs(running, model) if replica in file.stem]
    else:
        found = _replica_logs(running, target)
    if not found:
        raise UnknownName("model or replica", target, _known(running))
    return found


def _replica_logs(running: Context, model: str) -> list[Path]:
    """Of the replicas that run, else of those that ran last."""
    folder = Path(running.run_dir) / "logs" / model.replace("/", "--")
    return sorted(folder.glob("*.log"), key=lambda file: file.stat().st_mtime)


def _models_of(running: Context, name: str) -> bool:
    return name in _known(running)


def _known(running: Context) -> set[str]:
    return {variant.model for variant in _client(running).status().variants}


def _follow(file: Path) -> None:
    with file.open(encoding="utf-8", errors="replace") as text:
        text.seek(0, 2)
        try:
            while True:
                sys.stdout.write(text.read())
                sys.stdout.flush()
                time.sleep(0.2)
        except KeyboardInterrupt:
            return
