"""`bora logs`: the output of engines, of the gateway, of the controller or of Ray."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import typer

from cluster import context
from cluster.cli.log_follow import OVER, LogReader, ReplicaWatch, readers_of
from cluster.cli.log_follow import follow as go_on
from cluster.context import Context
from cluster.control_api import ControlClient
from cluster.errors import ClusterError
from cluster.messages import FleetStatus, ReplicaStatus
from cluster.names import log_folder
from placement.errors import UnknownName

_OWN = ("controller", "gateway", "ray")


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(logs)


def logs(
    target: Annotated[
        str, typer.Argument(help="MODEL, MODEL/REPLICA, `gateway`, `controller` or `ray`.")
    ],
    *,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Go on as lines come, also of replicas that come later."
        ),
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1)] = 100,
) -> None:
    """The output of a model's engines, of the gateway, of the controller or of Ray."""
    with contextlib.suppress(KeyboardInterrupt):
        readers, watch = _chosen(context.require(), target, follow=follow)
        for reader in readers:
            _show(reader, lines, heading=len(readers) > 1, partial=not follow)
        if follow:
            go_on(readers, watch)


def _show(reader: LogReader, lines: int, *, heading: bool, partial: bool) -> None:
    part = reader.last(lines, partial=partial)
    if part.missing or part.problem:
        why = part.problem or "nothing there yet"
        print(f"{reader.place}: {why}", file=sys.stderr)
        return
    if heading:
        print(f"==> {reader.place} <==")
    for line in part.lines:
        print(line)


class _NothingRanYet(ClusterError):
    """A model without a log."""

    exit_code = 2


def _chosen(
    running: Context, target: str, *, follow: bool
) -> tuple[list[LogReader], ReplicaWatch | None]:
    """Logs that `target` means, of a model at least one, and who looks for more of them.

    Raises:
        UnknownName: no such model or replica; with the nearest names.
        ClusterError: the model is known, but no replica of it has run.
    """
    folder = Path(running.run_dir) / "logs"
    if target in _OWN:
        return [LogReader(folder / f"{target}.log")], None
    client = ControlClient(running.controller_url, running.token)
    status = client.status()
    models = _models(status, folder)
    # A model's name may hold slashes itself, so that of all fitting ones the longest is meant.
    fitting = [name for name in models if f"{target}/".startswith(f"{name}/")]
    if not fitting:
        raise UnknownName("model or replica", target, models)
    name = max(fitting, key=len)
    replicas = [
        replica
        for variant in status.variants
        if variant.model == models[name]
        for replica in variant.replicas
    ]
    ended = sorted((folder / log_folder(models[name])).glob("*.log"), key=_written_s)
    wanted = target[len(name) + 1 :]
    readers = {reader.name: reader for each in replicas for reader in readers_of(each, client)}
    if wanted:
        readers = _of_replica(wanted, target, readers, ended)
    else:
        readers = _of_model(models[name], replicas, readers, ended)
    watch = None
    if follow:
        watch = ReplicaWatch(client, models[name], tuple(readers) if wanted else None)
    return list(readers.values()), watch


def _models(status: FleetStatus, folder: Path) -> dict[str, str]:
    """The model behind each name: those that ran before, then the fleet's and their aliases."""
    names = {unquote(entry.name): unquote(entry.name) for entry in folder.glob("*/")}
    for variant in status.variants:
        names |= dict.fromkeys(variant.aliases, variant.model)
    return names | {variant.model: variant.model for variant in status.variants}


def _of_model(
    model: str,
    replicas: Sequence[ReplicaStatus],
    readers: Mapping[str, LogReader],
    ended: Sequence[Path],
) -> dict[str, LogReader]:
    """Of the replicas that run, else of the one that ran last."""
    over = {Path(each.log_file).stem for each in replicas if each.state in OVER}
    running = {name: reader for name, reader in readers.items() if name not in over}
    if running:
        return running
    if not readers and not ended:
        raise _NothingRanYet(f"no replica of {model} has run yet: there is no log")
    if not ended:
        return dict(readers)
    return {ended[-1].stem: LogReader(ended[-1])}


def _of_replica(
    wanted: str, target: str, readers: Mapping[str, LogReader], ended: Sequence[Path]
) -> dict[str, LogReader]:
    """Of the replica called `wanted`; part of its name will do."""
    known = {file.stem: LogReader(file) for file in ended} | dict(readers)
    found = [wanted] if wanted in known else [name for name in known if wanted in name]
    if not found:
        raise UnknownName("replica", target, (f"{target[: -len(wanted)]}{name}" for name in known))
    return {name: known[name] for name in found}


def _written_s(file: Path) -> float:
    """0 for one that has just been taken away."""
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime
    return 0.0
