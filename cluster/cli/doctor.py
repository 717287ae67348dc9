"""`bora doctor`: is every host fit to serve, and if not, what cures it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cluster import context
from cluster.cli.render import page_console
from cluster.context import Context
from cluster.diagnosis import Check, Diagnosis, diagnose
from cluster.errors import ClusterError
from cluster.host_report import host_report
from cluster.local_inventory import local_inventory
from cluster.local_ray import use
from cluster.ssh_survey import ask_hosts, read_cluster
from placement.catalogue import Catalogue, load_catalogue
from placement.errors import PlacementError
from placement.fleet import GatewaySpec
from placement.inventory import Inventory
from placement.mismatch import Mismatch
from placement.mismatches import mismatches
from placement.node_facts import NodeFacts
from placement.spec import load_yaml

UNHEALTHY = 3
_STYLES = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(doctor)


def doctor(
    *,
    cluster: Annotated[
        Path | None, typer.Option(help="Ask the hosts of this cluster file over ssh.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ask the nodes of the Ray cluster at this GCS address.")
    ] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="What the hosts should be; else what their labels say.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Look only, measure nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check ssh, drivers, GPUs, P2P, versions, disk, clocks, ports and model access of every host.

    Without options the running cluster, or this machine alone. Exit code 3: something failed.
    """
    declared = None if inventory is None else load_yaml(inventory, Inventory)
    running = context.find()
    if cluster is not None:
        diagnosis = _over_ssh(cluster, declared, quick=quick)
    elif address or (running is not None and running.ray_address):
        diagnosis = _on_ray(address, running, declared, quick=quick)
    else:
        diagnosis = _here(declared, quick=quick)
    if json_:
        print(diagnosis.model_dump_json())
    else:
        page_console().print(diagnosis_table(diagnosis))
    sys.exit(0 if diagnosis.healthy else UNHEALTHY)


def diagnosis_table(diagnosis: Diagnosis) -> RenderableType:
    """A row a check, the bad ones of a host first."""
    table = Table("host", "check", "", "found", "cure", box=None)
    for check in diagnosis.checks:
        style = _STYLES[check.status]
        table.add_row(
            Text(check.host), check.check, Text(check.status, style=style),
            Text(check.found), Text(check.cure),
        )  # fmt: skip
    return table


def _here(declared: Inventory | None, *, quick: bool) -> Diagnosis:
    gateway = GatewaySpec()
    report = host_report(measure=not quick, ports=[gateway.http_port, gateway.grpc_port])
    others: list[Check] = []
    if declared is None:
        try:
            declared = local_inventory(load_catalogue(), report.facts)
        except (ClusterError, PlacementError) as error:
            others.append(_unfit(report.facts.host, error))
    lies = _lies(declared, [report.facts])
    return diagnose([(report.facts, report.state)], lies, others)


def _on_ray(
    address: str | None, running: Context | None, declared: Inventory | None, *, quick: bool
) -> Diagnosis:
    if running is not None and running.supervisor_pid:  # a Ray of our own, with its own token
        token = str(Path(running.run_dir) / "ray-token")
        use({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token})
    from cluster import bootstrap  # noqa: PLC0415 - imports Ray, which takes a second

    bootstrap.connect(address or (running.ray_address if running else ""))
    survey, states = bootstrap.examine_nodes(_progress, quick=quick)
    others = [
        Check(host=name, check="node", status="failed", found=why, cure="look at its raylet's log")
        for name, why in survey.unheard.items()
    ]
    others += [_untold(facts) for facts in survey.found if facts.node not in states]
    if declared is None:
        try:
            declared = bootstrap.inventory()
        except PlacementError as error:
            others.append(_unfit("cluster", error))
    bootstrap.disconnect()
    hosts = [(facts, states.get(facts.node)) for facts in survey.found]
    return diagnose(hosts, _lies(declared, survey.found), others)


def _over_ssh(path: Path, declared: Inventory | None, *, quick: bool) -> Diagnosis:
    hosts = read_cluster(path)
    reports, others = ask_hosts(hosts, _progress, quick=quick)
    found = [report.facts for report in reports]
    lies = _lies(declared or hosts.inventory, found)
    # That a host does not answer has its own row, with the reason.
    silent = {check.host for check in others if check.status == "failed"}
    lies = [lie for lie in lies if not (lie.rule == "node-missing" and lie.host in silent)]
    return diagnose([(report.facts, report.state) for report in reports], lies, others)


def _lies(
    declared: Inventory | None, found: list[NodeFacts] | tuple[NodeFacts, ...]
) -> list[Mismatch]:
    catalogue: Catalogue = load_catalogue()
    return [] if declared is None else list(mismatches(declared, found, catalogue=catalogue))


def _unfit(host: str, error: Exception) -> Check:
    cure = "correct the labels that its nodes are started with (`bora probe --ray-start`)"
    return Check(host=host, check="labels", status="failed", found=str(error), cure=cure)


def _untold(facts: NodeFacts) -> Check:
    found = "it did not tell its limits, its clock and whether it reaches the model hub"
    cure = "run `bora doctor` on that host"
    return Check(host=facts.host, check="node", status="warning", found=found, cure=cure)


def _progress(text: str) -> None:
    page_console(stderr=True).print(text, markup=False)
