"""`bora logs`: the output of engines, of the gateway, of the controller or of Ray."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import typer

from cluster import context
from cluster.context import Context
from cluster.control_api import ControlClient
from cluster.errors import ClusterError
from cluster.messages import FleetStatus, ReplicaStatus
from cluster.names import log_folder
from placement.errors import UnknownName

POLL_S = 0.2
_OWN = ("controller", "gateway", "ray")
_OVER = ("failed", "stopped")


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(logs)


def logs(
    target: Annotated[
        str, typer.Argument(help="MODEL, MODEL/REPLICA, `gateway`, `controller` or `ray`.")
    ],
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1)] = 100,
) -> None:
    """The output of a model's engines, of the gateway, of the controller or of Ray."""
    readers = [_Reader(file) for file in _log_files(context.require(), target)]
    for reader in readers:
        if not reader.file.exists():
            print(f"{reader.file}: nothing on this machine yet", file=sys.stderr)  # noqa: T201
            continue
        shown = reader.last(lines)
        if not follow:
            shown = [*shown, *reader.more(partial=True)][-lines:]
        if len(readers) > 1:
            print(f"==> {reader.file} <==")  # noqa: T201
        for line in shown:
            print(line)  # noqa: T201
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(readers)


class _NothingRanYet(ClusterError):
    """A model without a log."""

    exit_code = 2


class _Reader:
    """A log file as it grows; it need not exist yet."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offset = 0

    def last(self, count: int) -> list[str]:
        """The last `count` whole lines; `more` goes on after them."""
        with contextlib.suppress(FileNotFoundError), self.file.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            span, text = 0, b""
            while span < size and text.count(b"\n") <= count:
                span = min(size, 2 * span or 400 * count)
                log.seek(size - span)
                text = log.read(span)
            whole, end, _ = text.rpartition(b"\n")
            self._offset = size - span + len(whole + end)
            return whole.decode(errors="replace").splitlines()[-count:]
        return []

    def more(self, *, partial: bool = False) -> list[str]:
        """Whole lines that came since; with `partial` a last one without its end, too."""
        with contextlib.suppress(FileNotFoundError), self.file.open("rb") as log:
            if log.seek(0, os.SEEK_END) < self._offset:
                self._offset = 0  # begun anew
            log.seek(self._offset)
            text = log.read()
            text = text if partial else text[: text.rfind(b"\n") + 1]
            self._offset += len(text)
            return text.decode(errors="replace").splitlines()
        return []


def _follow(readers: Sequence[_Reader]) -> None:
    while True:
        for reader in readers:
            prefix = f"{reader.file.stem}: " if len(readers) > 1 else ""
            for line in reader.more():
                print(prefix + line)  # noqa: T201
        sys.stdout.flush()
        time.sleep(POLL_S)


def _log_files(running: Context, target: str) -> list[Path]:
    """Logs that `target` means, of a model at least one.

    Raises:
        UnknownName: no such model or replica; with the nearest names.
        ClusterError: the model is known, but no replica of it has run.
    """
    folder = Path(running.run_dir) / "logs"
    if target in _OWN:
        return [folder / f"{target}.log"]
    status = ControlClient(running.controller_url, running.token).status()
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
    if wanted:
        return _replica_logs(wanted, target, replicas, ended)
    return _model_logs(models[name], replicas, ended)


def _models(status: FleetStatus, folder: Path) -> dict[str, str]:
    """The model behind each name: those that ran before, then the fleet's and their aliases."""
    names = {unquote(entry.name): unquote(entry.name) for entry in folder.glob("*/")}
    for variant in status.variants:
        names |= dict.fromkeys(variant.aliases, variant.model)
    return names | {variant.model: variant.model for variant in status.variants}


def _model_logs(model: str, replicas: Sequence[ReplicaStatus], ended: Sequence[Path]) -> list[Path]:
    """Of the replicas that run, else of the one that ran last."""
    running = [Path(replica.log_file) for replica in replicas if replica.state not in _OVER]
    if not running and not ended:
        raise _NothingRanYet(f"no replica of {model} has run yet: there is no log")
    return running or list(ended[-1:])


def _replica_logs(
    wanted: str, target: str, replicas: Sequence[ReplicaStatus], ended: Sequence[Path]
) -> list[Path]:
    """Of the replica called `wanted`; part of its name will do."""
    files = {file.stem: file for file in ended}
    files |= {replica.replica: Path(replica.log_file) for replica in replicas}
    found = [wanted] if wanted in files else [name for name in files if wanted in name]
    if not found:
        raise UnknownName("replica", target, (f"{target[: -len(wanted)]}{name}" for name in files))
    return [files[name] for name in found]


def _written_s(file: Path) -> float:
    return file.stat().st_mtime
