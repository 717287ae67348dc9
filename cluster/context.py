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

    ray_address: str
    ray_tmpdir: str
    controller_url: str
    token: str
    http_url: str
    grpc_address: str
    run_dir: str
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
    """The saved context, if there is one that can be read."""
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
    return context


def forget() -> None:
    """Remove the saved context."""
    _path().unlink(missing_ok=True)


def _path() -> Path:
    return state_dir() / "context.json"
