"""A Ray head node on this machine, under the guard: it ends with the one who started it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterError
from cluster.files import write_private
from cluster.priority import NORMAL_PRIORITY
from cluster.processes import free_ports, start_guarded, stop_guarded, tail
from cluster.ray_settings import NO_LOG_MONITOR, SERVE_SETTINGS
from cluster.signals import signals_ignored

HOST = "127.0.0.1"
_TMPDIR_PREFIX = "bora-ray-"


@dataclass(frozen=True, slots=True)
class LocalRay:
    """A running head node; `stop` ends it and everything that runs on it."""

    process: subprocess.Popen[bytes]
    address: str
    tmpdir: str
    env: Mapping[str, str]

    def stop(self) -> None:
        """End Ray, the engines on it, and whatever they started."""
        stop_guarded(self.process, 60)
        remove_tmpdir(self.tmpdir)


def start_local_ray(
    *, resources: Mapping[str, float], num_gpus: int, labels: Mapping[str, str], run_dir: Path
) -> LocalRay:
    """Start a head node of our own: own temp dir, own ports, token authentication.

    Other Ray clusters on the machine are neither used nor touched.

    Raises:
        ClusterError: Ray did not start; its output is in the message.
    """
    # Unix socket paths end at 107 characters, so Ray's files cannot lie below a long run_dir. Ray
    # opens its temp dir to everybody: ours lies in one that only we may enter.
    tmpdir = str(Path(tempfile.mkdtemp(prefix=_TMPDIR_PREFIX)) / "ray")
    run_dir.mkdir(parents=True, exist_ok=True)
    token = run_dir / "ray-token"
    write_private(token, secrets.token_urlsafe(32))
    env = {
        "RAY_TMPDIR": tmpdir,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A dead node is found after some 3 s instead of 15; one that is only slow has 9 s.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "3",
        **NORMAL_PRIORITY,
        **SERVE_SETTINGS,
    }
    gcs, client, agent, agent_grpc, metrics = free_ports(5, HOST)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--node-ip-address", HOST, "--port", str(gcs), "--temp-dir", tmpdir]
    command += ["--ray-client-server-port", str(client), "--include-dashboard", "false"]
    command += [NO_LOG_MONITOR]
    command += ["--dashboard-agent-listen-port", str(agent)]
    command += ["--dashboard-agent-grpc-port", str(agent_grpc)]
    command += ["--metrics-export-port", str(metrics), "--num-gpus", str(num_gpus)]
    command += ["--object-store-memory", str(100 * 2**20), "--disable-usage-stats"]
    command += ["--resources", json.dumps(dict(resources)), "--labels", _pairs(labels)]
    log = run_dir / "logs" / "ray.log"
    # On SIGTERM Ray would drain the node for 30 s. What is worth draining (requests) has been
    # drained by the controller before.
    process = start_guarded(command, log=log, env=env, grace_s=2)
    ray = LocalRay(process, f"{HOST}:{gcs}", tmpdir, env)
    try:
        _wait_until_up(ray, log)
    except BaseException:  # Ctrl-C too: nothing may be left
        with signals_ignored():
            ray.stop()
        raise
    return ray


def remove_tmpdir(tmpdir: str) -> None:
    """What Ray left there; the folder is one that `start_local_ray` made."""
    if tmpdir and Path(tmpdir).parent.name.startswith(_TMPDIR_PREFIX):
        shutil.rmtree(Path(tmpdir).parent, ignore_errors=True)


def _wait_until_up(ray: LocalRay, log: Path, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while "Ray runtime started" not in tail(log, 200):
        if ray.process.poll() is not None or time.monotonic() > deadline:
            raise ClusterError(f"Ray did not start; the end of {log}:\n{tail(log, 30)}")
        time.sleep(0.1)


def use(ray_env: Mapping[str, str]) -> None:
    """Let `ray.init` in this process find the token of that cluster."""
    os.environ.update(ray_env)


def use_own_token() -> None:
    """Let `ray.init` in this process show the account's token.

    Without it a cluster that wants one says no only after minutes.
    """
    if "RAY_AUTH_MODE" not in os.environ and Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_MODE"] = "token"


def _pairs(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())
