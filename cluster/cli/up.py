"""`bora up`: Ray, engines and gateway on this machine, until Ctrl-C. `bora down` ends it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import psutil
import typer
from pydantic import ValidationError
from rich.console import Console

from cluster import context
from cluster.calibration_file import calibrated_catalogue
from cluster.cli.inventory_check import require_truth
from cluster.cli.render import feasible, page_console
from cluster.cli.waiting import wait_until_ready
from cluster.context import Context, state_dir
from cluster.control_api import ControlClient
from cluster.errors import AlreadyRunning, ClusterError
from cluster.facts_file import FACTS_FILE, keep_facts
from cluster.gateway_ports import checked_ports
from cluster.installation import Installation, install
from cluster.local_inventory import POOL, local_inventory
from cluster.local_ray import HOST, LocalRay, remove_tmpdir, start_local_ray
from cluster.models import catalogue_for, pinned
from cluster.names import SLOT
from cluster.priority import VARIABLE as PRIORITY
from cluster.probes.node import probe
from cluster.probes.speeds import with_speeds
from cluster.processes import free_ports
from cluster.ray_inventory import node_labels
from cluster.raylets import raylets
from cluster.signals import interrupt_on_signals, signals_ignored
from placement.canary import merged, with_canaries
from placement.catalogue import CONFIGS, Catalogue
from placement.errors import ConfigError, DoesNotFit
from placement.fleet import FleetModel, FleetSpec, GatewaySpec
from placement.fleet_file import load_fleet
from placement.inventory import Inventory
from placement.node_facts import NodeFacts
from placement.plan import Plan
from placement.planner import make_plan

DEFAULT_FLEET = CONFIGS / "fleets" / "local.yaml"


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(up)


def up(
    fleet: Annotated[Path, typer.Argument(help="Fleet YAML.")] = DEFAULT_FLEET,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Serve just this: catalogue name, Hugging Face repo id, folder or .gguf file."
        ),
    ] = None,
    http_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Instead of the fleet's.")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Instead of the fleet's.")
    ] = None,
) -> None:
    """Everything on this machine: Ray, engines, gateway. Ctrl-C stops all of it."""
    console = page_console(stderr=True)
    spec = _fleet(fleet, model, http_port, grpc_port)
    interrupt_on_signals()  # before `bora down` can know of this process
    try:
        with _only_one_here() as started:
            _run(spec, started, console)
    except KeyboardInterrupt:
        console.print("stopped: nothing of bora is left running", markup=False)


def _fleet(
    path: Path, model: str | None, http_port: int | None, grpc_port: int | None
) -> FleetSpec:
    spec = load_fleet(path) if model is None else _one_model(model)
    ports = {"http_port": http_port, "grpc_port": grpc_port}
    given = {key: port for key, port in ports.items() if port is not None}
    try:
        gateway = GatewaySpec.model_validate({**spec.gateway.model_dump(), **given})
    except ValidationError as error:
        raise ConfigError(f"--http-port, --grpc-port: {error.errors()[0]['msg']}") from None
    if gateway.replicas > 1:
        raise ConfigError(
            f"gateway.replicas: {gateway.replicas} gateways need a host each, and `bora up` serves "
            f"on this one; say 1, or bring hosts together (`bora cluster init`) and `bora deploy`"
        )
    return spec.model_copy(update={"gateway": gateway})


def _one_model(model: str) -> FleetSpec:
    name = Path(model).name.removesuffix(".gguf") if model and Path(model).exists() else model
    engine: Literal["llamacpp", "vllm"] = "llamacpp" if model.endswith(".gguf") else "vllm"
    try:
        wanted = FleetModel(name=name, model=model, engine=engine)
        return FleetSpec(fleet="one-model", models=(wanted,))
    except ValidationError:
        raise ConfigError(
            f"--model {model!r}: expected a catalogue name, a Hugging Face repo id, a folder or a "
            f".gguf file"
        ) from None


def _run(spec: FleetSpec, started: Context, console: Console) -> None:
    """Start everything, wait for Ctrl-C, stop everything."""
    planned = with_canaries(spec)
    catalogue = catalogue_for(planned, calibrated_catalogue())
    facts = probe(measure=False)
    _require_one_kind(facts, catalogue)
    if facts.gpus:
        console.print("measuring this machine's GPUs", markup=False)
        facts = with_speeds(facts, lambda text: console.print(f"  {text}", markup=False))
    inventory = local_inventory(catalogue, facts)
    plan = pinned(feasible(merged(make_plan(planned, inventory, catalogue), spec), console))
    require_truth(plan, inventory, [facts], catalogue, console)
    plan = plan.model_copy(update={"gateway": checked_ports(plan.gateway)})
    run_dir = _fresh_run_dir(started)
    started_s = time.monotonic()
    console.print(f"starting Ray on this machine (logs: {run_dir / 'logs'})", markup=False)
    keep_facts(run_dir.parent / FACTS_FILE, [facts])
    ray = _start_ray(inventory, run_dir)
    client: ControlClient | None = None
    try:
        client = _start_bora(ray, plan, started)
        wait_until_ready(client, plan, console, still_up=lambda: ray.process.poll() is None)
        _say_ready(console, plan, time.monotonic() - started_s)
        _serve_until_interrupted(ray)
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C skips the draining
            if client is not None and ray.process.poll() is None:
                console.print(
                    "stopping: running requests may finish, Ctrl-C again to cut", markup=False
                )
                with contextlib.suppress(ClusterError):
                    client.stop()
        with signals_ignored():
            ray.stop()


def _require_one_kind(facts: NodeFacts, catalogue: Catalogue) -> None:
    """`bora up` starts one Ray node, and all devices of a Ray node are of one kind.

    Raises:
        DoesNotFit: they are not; with the commands that start a Ray node for each kind.
    """
    kinds = raylets(facts, catalogue, POOL)
    if not any(each.environment for each in kinds):
        return
    commands = "\n".join(f"  {each.start_arguments()} --address HOST:PORT" for each in kinds)
    devices = ", ".join(f"{each.pool.gpus_per_node} x {each.pool.gpu}" for each in kinds)
    raise DoesNotFit(
        f"this machine has {devices}, and `bora up` serves on one kind. "
        f"Start Ray with a node for each kind, then `bora deploy FLEET --address HOST:PORT`:\n"
        f"  {PRIORITY}=0 ray start --head --num-gpus 0\n{commands}"
    )


def _start_ray(inventory: Inventory, run_dir: Path) -> LocalRay:
    [pool] = inventory.pools
    cpu = pool.gpu == "cpu"
    return start_local_ray(
        resources={SLOT: float(pool.gpus_per_node)} if cpu else {},
        num_gpus=0 if cpu else pool.gpus_per_node,
        labels=node_labels(pool),
        run_dir=run_dir,
    )


def _start_bora(ray: LocalRay, plan: Plan, started: Context) -> ControlClient:
    token = secrets.token_urlsafe(32)
    [port] = free_ports(1, HOST)
    wanted = Installation(
        address=ray.address,
        run_dir=Path(started.run_dir),
        token=token,
        host=HOST,
        control_port=port,
        gateway=plan.gateway,
    )
    install(wanted, ray.env)
    url = f"http://{HOST}:{port}"
    changes = {
        "ray_address": ray.address,
        "ray_tmpdir": ray.tmpdir,
        "controller_url": url,
        "token": token,
    }
    context.save(started.model_copy(update=changes))
    client = ControlClient(url, token)
    client.apply(plan)
    return client


def _say_ready(console: Console, plan: Plan, seconds: float) -> None:
    gateway = plan.gateway
    name = plan.variants[0].model
    url = f"http://{gateway.host}:{gateway.http_port}"
    header = " -H 'authorization: Bearer KEY'" if gateway.auth == "keys" else ""
    if header:
        console.print("clients need a key: `bora keys create NAME` makes one", markup=False)
    console.print(
        f"ready after {seconds:.0f} s: {', '.join(dict.fromkeys(v.model for v in plan.variants))}\n"
        f"  HTTP  {url}/v1\n"
        f"  gRPC  {gateway.host}:{gateway.grpc_port}\n"
        f"  try   curl {url}/v1/chat/completions -H 'content-type: application/json'{header} -d "
        f"""'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'\n"""
        "  stop  Ctrl-C, or `bora down`",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _serve_until_interrupted(ray: LocalRay) -> NoReturn:
    while ray.process.poll() is None:
        time.sleep(0.2)
    raise ClusterError(
        f"Ray ended by itself; its output is in {context.state_dir()}/run/logs/ray.log"
    )


def _fresh_run_dir(started: Context) -> Path:
    """An empty folder for this run's logs and plan; the last run's is replaced."""
    run_dir = Path(started.run_dir)
    shutil.rmtree(run_dir, ignore_errors=True)
    (run_dir / "logs").mkdir(parents=True, mode=0o700)
    return run_dir


@contextlib.contextmanager
def _only_one_here() -> Iterator[Context]:
    """Hold the state folder, with a context by which `bora down` finds this process.

    The lock ends with this process, however it ends.
    """
    with (context.made_state_dir() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(
                f"bora already runs here ({state_dir()}). Stop it with `bora down`, or set "
                f"BORA_STATE to another folder for a second one"
            ) from None
        _clear_what_is_left()
        started = Context(
            run_dir=str(state_dir() / "run"),
            supervisor_pid=os.getpid(),
            supervisor_started_s=psutil.Process().create_time(),
        )
        context.save(started)
        try:
            yield started
        finally:
            context.forget()


def _clear_what_is_left() -> None:
    """Of a `bora up` that was killed; what `bora deploy` made elsewhere is not ours to end."""
    before = context.last()
    if before is None:
        return
    if not before.supervisor_pid:
        raise AlreadyRunning(
            f"{state_dir()} holds the key to the bora on the Ray cluster at {before.ray_address}. "
            f"End that with `bora down` first, or set BORA_STATE to another folder"
        )
    remove_tmpdir(before.ray_tmpdir)
