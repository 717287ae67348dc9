"""`bora plan`, `bora diff`: what would run where, and what would change. Nothing is started."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from cluster import context
from cluster.calibration_file import calibrated_catalogue
from cluster.cli.catalogue import Json
from cluster.cli.plan_html import plan_html
from cluster.cli.plan_pages import explanation_page, migration_page
from cluster.cli.plan_svg import plan_svg
from cluster.cli.render import page_console, plan_page
from cluster.control_api import ControlClient
from cluster.local_inventory import local_inventory
from cluster.models import catalogue_for, pinned
from placement.canary import CANARY, apart, merged, with_canaries
from placement.catalogue import Catalogue
from placement.changes import migration
from placement.errors import ConfigError, PlacementError, UnknownName
from placement.explain import explain
from placement.fleet import FleetSpec
from placement.fleet_file import load_fleet
from placement.inventory import Inventory
from placement.plan import Plan
from placement.planner import make_plan
from placement.spec import dump_yaml, load_yaml, place

InventoryFile = Annotated[
    Path | None,
    typer.Option(
        "--inventory", help="Pools to plan for; without it the running cluster, or this machine."
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--from", help="The plan that runs (YAML or JSON) instead of the cluster's."),
]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(plan)
    app.command()(diff)


def plan(
    fleet: Path,
    *,
    inventory: InventoryFile = None,
    from_: PlanFile = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan as YAML.")] = None,
    explain_: Annotated[
        bool, typer.Option("--explain", help="Why so, and what would change it.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write the plan as a page to look at.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the GPUs as a picture.")] = None,
    json_: Json = False,
) -> None:
    """Solve a fleet on an inventory; nothing is started."""
    offered = inventory_for(inventory, calibrated_catalogue())
    running = None if from_ is None else load_yaml(from_, Plan)
    answer = solve_on(fleet, offered, running)
    reasons = None
    if explain_:
        spec = with_canaries(load_fleet(fleet))
        catalogue = catalogue_for(spec, calibrated_catalogue())
        before = None if running is None else apart(running)
        reasons = explain(spec, offered, catalogue, apart(answer), running=before)
    moved = None if running is None else migration(running, answer)
    if out is not None:
        _write(out, dump_yaml(answer), "--out")
    if html is not None:
        _write(html, plan_html(answer, offered, explanation=reasons, moved=moved), "--html")
    if svg is not None:
        _write(svg, plan_svg(answer, offered), "--svg")
    if json_:
        told = answer.model_dump(mode="json")
        if reasons is not None:
            told["explanation"] = reasons.model_dump(mode="json")
        print(json.dumps(told))
    else:
        parts = [plan_page(answer)]
        parts += [] if reasons is None else [explanation_page(reasons, answer.currency)]
        parts += [] if moved is None else [migration_page(moved)]
        page_console().print(Group(*parts))
    sys.exit(3 if answer.status == "infeasible" else 0)


def diff(
    fleet: Path,
    *,
    inventory: InventoryFile = None,
    from_: PlanFile = None,
    json_: Json = False,
) -> None:
    """What deploying this fleet would change: replicas, bytes to load, lost capacity, cost."""
    offered = inventory_for(inventory, calibrated_catalogue())
    running = load_yaml(from_, Plan) if from_ is not None else _running_plan()
    answer = pinned(solve_on(fleet, offered, running), running)
    moved = migration(running, answer)
    if json_:
        print(moved.model_dump_json())
    else:
        parts = [] if answer.status != "infeasible" else [plan_page(answer)]
        page_console().print(Group(*parts, migration_page(moved)))
    sys.exit(3 if answer.status == "infeasible" else 0)


def _running_plan() -> Plan:
    """What the cluster serves; an empty plan when that is nothing."""
    running = context.require()
    served = ControlClient(running.controller_url, running.token).plan()
    return served or Plan.empty()


def solve(fleet: Path, inventory: Path | None, running: Plan | None = None) -> Plan:
    """The plan for a fleet file on an inventory file, the running cluster, or this machine."""
    return solve_on(fleet, inventory_for(inventory, calibrated_catalogue()), running)


def solve_on(fleet: Path, offered: Inventory, running: Plan | None = None) -> Plan:
    """The plan for a fleet file on an inventory, near to the `running` one.

    Raises:
        ConfigError: the file is wrong, or names a model, pool or GPU type that is not there.
    """
    spec = load_fleet(fleet)
    planned, catalogue = with_canaries(spec), calibrated_catalogue()
    problems = []
    for wish in planned.models:
        try:
            catalogue = catalogue_for(planned.model_copy(update={"models": (wish,)}), catalogue)
        except (UnknownName, ConfigError) as error:
            problems.append(
                f"{_place_of_model(fleet, spec, wish.name)}: {error}{_where_known(error)}"
            )
    problems += _unknown_names(fleet, spec, offered, catalogue)
    if not problems:
        problems = _impossible_wishes(fleet, spec, catalogue)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    started_s = time.perf_counter()
    before = None if running is None else apart(running)
    plan = merged(make_plan(planned, offered, catalogue, running=before), spec)
    return plan.model_copy(update={"solve_s": time.perf_counter() - started_s})


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


def _place_of_model(fleet: Path, spec: FleetSpec, name: str) -> str:
    """Where the file says which model this is; of a canary, unless it says so itself, its model's."""
    names = [model.name for model in spec.models]
    index = names.index(name if name in names else name.removesuffix(CANARY))
    canary = spec.models[index].canary
    own = name not in names and canary is not None and canary.model is not None
    return place(fleet, "models", index, *(("canary",) if own else ()), "model")


def _where_known(error: PlacementError) -> str:
    """Where the names stand that are known, if there are too many to tell."""
    if not isinstance(error, UnknownName) or "; " in str(error):
        return ""
    return f"; `bora {'gpus' if error.kind == 'GPU type' else 'models'}` lists those that are known"


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


def _impossible_wishes(fleet: Path, spec: FleetSpec, catalogue: Catalogue) -> list[str]:
    """A line for each wish that its model fulfils on no GPU whatever."""
    problems = []
    for index, wish in enumerate(spec.models):
        model = catalogue.model(wish.model)
        if wish.max_model_len is not None and wish.max_model_len > model.context:
            where = place(fleet, "models", index, "max_model_len")
            problems.append(
                f"{where}: {wish.max_model_len} is more than the context of {model.name}; "
                f"give {model.context} or less"
            )
        have = sorted({checkpoint.precision for checkpoint in model.checkpoints})
        if wish.precision != "any" and not set(wish.precision) & set(have):
            where = place(fleet, "models", index, "precision")
            problems.append(
                f"{where}: {model.name} has no checkpoint in {', '.join(wish.precision)}; "
                f"known: {', '.join(have)}"
            )
    return problems


def _unknown_gpu(name: str, catalogue: Catalogue) -> str:
    """What is wrong with this GPU type; empty: nothing."""
    try:
        catalogue.gpu(name)
    except UnknownName as error:
        return f"{error}{_where_known(error)}"
    return ""


def _write(path: Path, text: str, option: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror}") from error
