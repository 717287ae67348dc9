"""Context: how later commands find what `bora up` or `bora deploy` started (like a kubeconfig)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from cluster.errors import ClusterUnreachable
from cluster.files import write_private
from cluster.processes import is_alive
from placement.errors import ConfigError
from placement.spec import Spec

_FILE = "context.json"


class Context(Spec):
    """Kept in `state_dir()/context.json`, readable by its owner only: it holds the token."""

    run_dir: str
    ray_address: str = ""
    ray_tmpdir: str = ""
    controller_url: str = ""  # empty: still starting
    token: str = ""
    supervisor_pid: int = 0  # of `bora up`; 0: made by `bora deploy` on a cluster of others
    supervisor_started_s: float = 0.0

    @property
    def supervised(self) -> bool:
        """Whether the `bora up` that made it still runs."""
        return self.supervisor_pid > 0 and is_alive(self.supervisor_pid, self.supervisor_started_s)


def state_dir() -> Path:
    """`$BORA_STATE`, else `bora` in the XDG state folder; it need not exist yet.

    Raises:
        ConfigError: it cannot be a folder.
    """
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    path = Path(os.environ.get("BORA_STATE") or Path(base) / "bora")
    with _told(path):
        existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise ConfigError(f"{path}: bora's state folder (BORA_STATE): {existing} is not a folder")
    return path


def made_state_dir() -> Path:
    """`state_dir()`, which exists now.

    Raises:
        ConfigError: it cannot be made.
    """
    path = state_dir()
    with _told(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def save(context: Context) -> None:
    """Write the context for later commands.

    Raises:
        ConfigError: it cannot be written.
    """
    made_state_dir()
    path = _path()
    with _told(path):
        write_private(path, context.model_dump_json(indent=2))


def save_where_missing(context: Context) -> bool:
    """Write it beside its `run_dir` for commands on this host, if its disk was lost; whether it was.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(context.run_dir).parent / _FILE
    with _told(path):
        if path.exists():
            return False
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, context.model_dump_json(indent=2))
    return True


def find() -> Context | None:
    """The saved context, unless the `bora up` that made it has ended without taking it away.

    Raises:
        ConfigError: there is something, but it cannot be read.
    """
    context = last()
    return context if context and (context.supervised or not context.supervisor_pid) else None


def last() -> Context | None:
    """The saved context, whether what made it still runs or not.

    Raises:
        ConfigError: there is something, but it cannot be read.
    """
    path = _path()
    with _told(path), contextlib.suppress(FileNotFoundError, ValidationError):
        return Context.model_validate_json(path.read_bytes())
    return None


def require() -> Context:
    """The saved context.

    Raises:
        ClusterUnreachable: nothing was started, or it has been stopped.
        ConfigError: there is something, but it cannot be read.
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
    """Remove the saved context.

    Raises:
        ConfigError: it cannot be removed.
    """
    path = _path()
    with _told(path):
        path.unlink(missing_ok=True)


def _path() -> Path:
    return state_dir() / _FILE


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system refuses becomes an error with the path and the cause."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: bora keeps its state there, but: {error.strerror}. Set BORA_STATE to a "
            f"folder that you may write"
        ) from error
