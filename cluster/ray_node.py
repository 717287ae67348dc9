"""Ray on this host, as one cluster's node: `python -m cluster.ray_node start|stop --cluster NAME`.

What `ray start` and `ray stop` of a cluster file come down to. Every process of the cluster carries
its name in the environment, or descends from one that does, or (Ray's helpers write their titles
over their environment) holds a log file of the cluster's open: so `stop` ends all of them, engines
too, and nobody else's. A start that would change nothing leaves the running node alone.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from cluster.context import made_state_dir
from cluster.errors import ClusterError
from cluster.head_store import HeadStore, is_kept, store_of
from cluster.node_record import NodeRecord, boot_id, needed, read_record, write_record
from cluster.priority import NORMAL_PRIORITY, ahead_of_workers
from cluster.priority import VARIABLE as PRIORITY
from cluster.ray_settings import SERVE_SETTINGS
from placement.errors import PlacementError

CLUSTER_VARIABLE = "BORA_CLUSTER"
_BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
# What a node is started with beside its command, where Ray's cluster launcher sets it.
_IDENTITY = (
    "RAY_HEAD_IP", "RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME",
    "RAY_OVERRIDE_RESOURCES", "RAY_OVERRIDE_LABELS",
)  # fmt: skip
_RAYLET = "raylet/raylet"
_GCS = "gcs_server"
_REPLICA = "ray::ServeReplica:bora:"
_OPEN_FILES = 65536
_TERM_GRACE_S = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: that of `ray start`, 0, or an error's own."""
    parser = argparse.ArgumentParser(prog="ray_node")
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("--cluster", required=True, help="its name")
    parser.add_argument("--drain-s", type=float, default=0.0, help="how long streams may go on")
    given = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if "--" in given:  # what follows is `ray start ...`
        at = given.index("--")
        given, command = given[:at], given[at + 1 :]
    options = parser.parse_args(given)
    try:
        with _one_at_a_time(options.cluster):
            if options.action == "start":
                return start(options.cluster, command)
            stop_for_good(options.cluster, drain_s=options.drain_s)
    except (ClusterError, PlacementError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def start(cluster: str, command: Sequence[str]) -> int:
    """Run `command` (`ray start ...`), unless a node started by the same one runs here.

    A node that was started otherwise is stopped first.
    """
    wanted, file = _digest(command, os.environ), _record_file(cluster)
    before = read_record(file)
    if before is not None and before.digest == wanted and before.runs:
        _say("Ray runs here as it should: nothing changed")
        return 0
    stop(cluster, drain_s=0)
    if not is_kept():
        head_state_file(cluster).unlink(missing_ok=True)  # what was launched from here is gone
    _raise_limits()
    environment = environment_of_ray(cluster, os.environ)
    if PRIORITY not in os.environ:
        environment |= ahead_of_workers()
    ray = [sys.executable, "-m", "ray.scripts.scripts", *command[1:]]
    status = subprocess.run(ray, env=environment, check=False).returncode
    if status != 0:  # Ray's own time limit is short for a host that is just booting
        stop(cluster, drain_s=0)
        status = subprocess.run(ray, env=environment, check=False).returncode
    here = _of_cluster(cluster)
    raylet = next(_like(here, _RAYLET), None)
    if status == 0 and raylet is not None:
        living = [needed(process.pid) for process in (raylet, *_like(here, _GCS))]
        record = NodeRecord(
            digest=wanted,
            boot=boot_id(),
            needed=tuple(process for process in living if process is not None),
            session=_option(raylet.cmdline(), "session-dir"),
            store=_store(cluster),
        )
        write_record(file, record)
    return status


def environment_of_ray(cluster: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """What `ray start` runs in; a setting that the operator made is his."""
    own = {CLUSTER_VARIABLE: cluster, "RAY_USAGE_STATS_ENABLED": "0"}
    return {**NORMAL_PRIORITY, **SERVE_SETTINGS, **inherited, **own}


def stop(cluster: str, *, drain_s: float) -> None:
    """End all processes of the cluster on this host; with `drain_s`, streams may finish before.

    On the head bora itself is stopped, on all hosts; elsewhere Ray is told that this node goes, so
    that its replicas move.
    """
    found = _of_cluster(cluster)
    if found and drain_s > 0:
        _drain(found, drain_s)
        found |= _of_cluster(cluster)
    raylets = set(_like(found, _RAYLET))
    _end(lambda: _alive(raylets))  # first, so that it signs off from the cluster
    known = set(found)

    def left() -> set[psutil.Process]:
        known.update(_of_cluster(cluster))
        return _alive(known)

    _end(left)
    _say(f"{len(found)} processes of {cluster} were running here, none is left")


def stop_for_good(cluster: str, *, drain_s: float) -> None:
    """As `stop`, and what a head keeps in Redis is forgotten, also of one that has died before.

    Otherwise the next head would take up what was just stopped.

    Raises:
        StateKept: Redis cannot be told.
    """
    record = read_record(_record_file(cluster))
    store = _store(cluster) or (record.store if record else None)
    stop(cluster, drain_s=drain_s)
    head_state_file(cluster).unlink(missing_ok=True)
    if store is not None:
        store.forget()
    _record_file(cluster).unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(cluster: str) -> Iterator[None]:
    """Of two starts at once each would end the other's processes."""
    with (made_state_dir() / f"cluster-{cluster}-node.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another start or stop of {cluster} goes on here: waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _store(cluster: str) -> HeadStore | None:
    """Where the head that runs on this host keeps its state, if it survives it."""
    for gcs in _like(_of_cluster(cluster), _GCS):
        with contextlib.suppress(psutil.Error):
            return store_of(gcs.cmdline(), gcs.environ())
    return None


def head_state_file(cluster: str) -> Path:
    """Where the head keeps which hosts it has started."""
    return made_state_dir() / f"cluster-{cluster}-head.json"


def _drain(processes: set[psutil.Process], drain_s: float) -> None:
    raylet = next(_like(processes, _RAYLET), None)
    if raylet is None:
        return
    deadline = time.monotonic() + drain_s
    with contextlib.suppress(psutil.NoSuchProcess):
        gcs = _option(raylet.cmdline(), "gcs-address")
        if not _listens(gcs):  # the cluster is gone already
            return
        on_head = any(_like(processes, _GCS))
        what = "bora" if on_head else _option(raylet.cmdline(), "node-id")
        command = [sys.executable, "-m", "cluster.ray_drain", gcs, what, str(round(drain_s))]
        _say(f"draining {'the cluster' if on_head else 'this node'} for at most {drain_s:.0f} s")
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=raylet.environ(), timeout=drain_s + 5, check=False)
    while time.monotonic() < deadline and any(_like(processes, _REPLICA)):
        time.sleep(0.2)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, ValueError):
        socket.create_connection((host, int(port)), timeout=2).close()
        return True
    return False


def _end(left: Callable[[], set[psutil.Process]]) -> None:
    """SIGTERM, a while later SIGKILL, until `left` finds nothing."""
    deadline = time.monotonic() + _TERM_GRACE_S
    told: set[int] = set()
    while processes := left():
        late = time.monotonic() > deadline
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if late:
                    process.kill()
                elif process.pid not in told:
                    told.add(process.pid)
                    process.terminate()
        time.sleep(0.1)


def _of_cluster(cluster: str) -> set[psutil.Process]:
    """Live processes of the cluster, this one and those above it not among them."""
    marker = f"{CLUSTER_VARIABLE}={cluster}".encode()
    record = read_record(_record_file(cluster))
    session = (record.session if record else "") or "-"
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if marker in environment or _writes_below(session, process):
                found |= {process, *process.children(recursive=True)}
    own = psutil.Process()
    return _alive(found - {own, *own.parents()})


def _writes_below(session: str, process: psutil.Process) -> bool:
    if not process.cmdline()[:1] or not process.cmdline()[0].startswith("ray::"):
        return False
    return any(file.path.startswith(session) for file in process.open_files())


def _alive(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    alive = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.add(process)
    return alive


def _like(processes: Iterable[psutil.Process], name: str) -> Iterator[psutil.Process]:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()[:1]):
                yield process


def _option(command: Sequence[str], name: str) -> str:
    """The value of `--name=value`, with dashes or underscores."""
    for argument in command:
        flag, equals, value = argument.lstrip("-").partition("=")
        if equals and flag.replace("_", "-") == name:
            return value
    return ""


def _digest(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a running node must have been started with to be left alone."""
    identity = [environment.get(name, "") for name in _IDENTITY]
    text = json.dumps([list(command), identity])
    config = _BOOTSTRAP_CONFIG.expanduser()
    if "--head" in command and config.exists():
        text += config.read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def _record_file(cluster: str) -> Path:
    return made_state_dir() / f"cluster-{cluster}-node.json"


def _raise_limits() -> None:
    """Ray and engines hold many sockets; as far as this account may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - read in `ray up`'s output


if __name__ == "__main__":
    sys.exit(main())
