"""Context: how later commands find what `bora up` or `bora deploy` started (like a kubeconfig)."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from cluster.errors import ClusterUnreachable
from cluster.processes import is_alive
from placement.spec import Spec


class Context(Spec):
    """Kept in `state_dir()/context.json`, readable by its owner only: it holds the token."""

    run_dir: str
    ray_address: str = ""
    ray_tmpdir: str = ""
    controller_url: str = ""  # empty: still starting
    token: str = ""
    http_url: str = ""
    grpc_address: str = ""
    supervisor_pid: int = 0  # of `bora up`; 0: made by `bora deploy` on a cluster of others
    supervisor_started_s: float = 0.0

    @property
    def supervised(self) -> bool:
        """Whether the `bora up` that made it still runs."""
        return self.supervisor_pid > 0 and is_alive(self.supervisor_pid, self.supervisor_started_s)


def state_dir() -> Path:
    """`$BORA_STATE`, else `bora` in the XDG state folder."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(os.environ.get("BORA_STATE") or Path(base) / "bora")


def save(context: Context) -> None:
    """Write the context for later commands."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(context.model_dump_json(indent=2))


def find() -> Context | None:
    """The saved context, unless the `bora up` that made it has ended without taking it away."""
    context = last()
    return context if context and (context.supervised or not context.supervisor_pid) else None


def last() -> Context | None:
    """The saved context, whether what made it still runs or not."""
    try:
        return Context.model_validate_json(_path().read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def require() -> Context:
    """The saved context.

    Raises:
        ClusterUnreachable: nothing was started, or it has been stopped.
    """
    context = find()
    if context is None:
        raise ClusterUnreachable(
            f"no bora runs here (no {_path()}). Start one with `bora up`, or deploy to a Ray "
            f"cluster with `bora deploy FLEET --address HOST:PORT`"
        )
    if not context.controller_url:
        raise ClusterUnreachable("bora is still starting; its terminal shows how far it is")
    return context


def forget() -> None:
    """Remove the saved context."""
    _path().unlink(missing_ok=True)


def _path() -> Path:
    return state_dir() / "context.json"
