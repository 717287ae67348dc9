"""`bora probe`: what this host has, and how Ray is to be started on it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.cli.render import page_console
from cluster.probes.node import probe as probe_host
from cluster.raylets import raylets
from placement.catalogue import load_catalogue
from placement.mismatch import GIB
from placement.node_facts import NodeFacts


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(probe)


def probe(
    *,
    quick: Annotated[bool, typer.Option(help="Look only, measure nothing.")] = False,
    ray_start: Annotated[
        bool, typer.Option(help="Print a `ray start` for each kind of device of this box.")
    ] = False,
    pool: Annotated[str, typer.Option(help="With --ray-start: the pool it joins.")] = "gpus",
    json_: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """What this host really has: GPUs, links, memory, disk, network, versions, speeds."""
    console = page_console(stderr=True)
    facts = probe_host(
        measure=not (quick or ray_start), progress=lambda text: console.print(text, markup=False)
    )
    if ray_start:
        for each in raylets(facts, load_catalogue(), pool):
            print(each.start_arguments())
    elif json_:
        print(facts.model_dump_json())
    else:
        page_console().print(facts_page(facts))


def facts_page(facts: NodeFacts) -> RenderableType:
    """A host as a page."""
    lines = Table(show_header=False, box=None)
    lines.add_row("CPU", f"{facts.cpu}, {facts.cores} cores, {' '.join(facts.cpu_features)}")
    lines.add_row("memory", f"{facts.host_memory_bytes / GIB:.1f} GiB")
    if facts.disk is not None:
        lines.add_row(
            "model cache",
            f"{facts.disk.path}: {facts.disk.free_bytes / GIB:.1f} GiB free, "
            f"read at {_rate(facts.disk.read_bytes_per_s)}, {len(facts.disk.cached)} models",
        )
    nics = ", ".join(f"{nic.name} {nic.gbps or '?'} Gbit/s" for nic in facts.nics)
    lines.add_row("network", nics or "none")
    lines.add_row("versions", ", ".join(f"{key} {value}" for key, value in facts.versions.items()))
    lines.add_row("driver", facts.driver or "none")
    if facts.measured is not None:
        seconds = facts.measured.all_reduce_s
        reduced = "?" if seconds is None else f"{seconds * 1e6:.0f} us"
        lines.add_row(
            f"measured ({facts.measured.device})",
            f"copy {_rate(facts.measured.copy_bytes_per_s)}, all-reduce of 1 MiB over "
            f"{facts.measured.ranks} ranks {reduced} {facts.measured.problem}",
        )
    parts: list[RenderableType] = [Text(facts.host), lines]
    parts += [_gpus(facts)] if facts.gpus else []
    parts += [_pairs(facts)] if facts.pairs else []
    return Group(*parts, *(Text(problem, style="red") for problem in facts.problems))


def _gpus(facts: NodeFacts) -> Table:
    table = Table("GPU", "name", "memory (torch)", "PCIe", "ECC", "MIG", "from host", box=None)
    for gpu in facts.gpus:
        torch = "?" if gpu.torch_memory_bytes is None else f"{gpu.torch_memory_bytes / GIB:.2f}"
        ecc = {True: "on", False: "off", None: "-"}[gpu.ecc]
        table.add_row(
            str(gpu.index),
            gpu.name,
            f"{gpu.memory_bytes / GIB:.2f} ({torch}) GiB",
            f"gen {gpu.pcie_max_generation} x{gpu.pcie_width} of x{gpu.pcie_max_width}",
            f"{ecc}, {gpu.uncorrected_errors} errors" if gpu.uncorrected_errors else ecc,
            ", ".join(each.profile for each in gpu.mig_slices) or ("on" if gpu.mig else "-"),
            _rate(gpu.host_to_device_bytes_per_s),
        )
    return table


def _pairs(facts: NodeFacts) -> Table:
    table = Table("GPUs", "path", "peer access", "copies", "speed", box=None)
    for pair in facts.pairs:
        right = {True: "right", False: "WRONG", None: "not measured"}[pair.copy_correct]
        ends = f"{pair.first} - {pair.second}"
        table.add_row(ends, pair.path, pair.peer, right, _rate(pair.copy_bytes_per_s))
    return table


def _rate(bytes_per_s: float | None) -> str:
    return "?" if bytes_per_s is None else f"{bytes_per_s / 1e9:.1f} GB/s"
