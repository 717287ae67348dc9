"""A cluster of several Ray nodes on this machine, with bora on it: started, known, killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.drill_processes import free_ports
from loadtests.processes import CannotRun, last_line

_BORA = [sys.executable, "-m", "cluster"]
_RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
_HOST = "127.0.0.1"
_MARK = "BORA_DRILL_NODE"
_START_S = 180.0
_TRIES = 3  # of a node's start
# A dead node is found after some 3 s instead of Ray's 15.
_HEALTH = {"period_ms": "1000", "timeout_ms": "3000", "failure_threshold": "3"}


class DrillCluster:
    """A head node and `workers` of `slots` slots each, or of `gpus` GPUs, which need not be there.

    All processes carry a mark by which they end.
    `temporary` is short: Unix socket paths end at 107 characters. `env` is added to the environment
    of all nodes, `env_of` to that of workers, by name.
    """

    def __init__(
        self,
        temporary: Path,
        *,
        workers: Sequence[str],
        slots: int,
        gpus: int = 0,
        env: Mapping[str, str] | None = None,
        env_of: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._folder = temporary
        self._env_of = env_of or {}
        self._slots = slots
        self._gpus = gpus
        self._workers = workers
        [self._gcs_port] = free_ports(1)
        self._started: list[subprocess.Popen[bytes]] = []
        self._mark = secrets.token_hex(8)
        token = temporary / "token"
        token.write_text(secrets.token_urlsafe(32))
        token.chmod(0o600)
        self.env = {
            **os.environ,
            "BORA_STATE": str(temporary / "state"),
            "RAY_TMPDIR": str(temporary / "ray"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # as on bora's own clusters
            # As on bora's own clusters (`cluster.ray_settings`): no request goes through Serve.
            "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
            "RAY_SERVE_STOP_FAILED_ROLLING_UPDATES": "0",
            "RAY_task_events_report_interval_ms": "10000",
            **{f"RAY_health_check_{name}": value for name, value in _HEALTH.items()},
            **(env or {}),
        }

    @property
    def address(self) -> str:
        """Of Ray's GCS."""
        return f"{_HOST}:{self._gcs_port}"

    def start(self) -> None:
        """Start all nodes; returns when the last one has joined.

        Raises:
            CannotRun: one does not come up.
        """
        self.start_head()
        for name in self._workers:
            self.start_worker(name)

    def start_head(self) -> None:
        """Start the head node, or start it again at the same address."""
        client, *_ = free_ports(1)
        head = ["--head", "--port", str(self._gcs_port), "--include-dashboard", "false"]
        head += ["--ray-client-server-port", str(client), "--num-gpus", "0"]
        self._start_node("head", [*head, "--temp-dir", self.env["RAY_TMPDIR"]])

    def start_worker(self, name: str) -> None:
        """Start one worker node, or start it again."""
        labels = "bora.pool=sim,bora.gpu=cpu,bora.memory-gib=8,bora.kv-cache-gib=1"
        resources = json.dumps({"bora_slot": self._slots})
        if self._gpus:
            labels, resources = "bora.pool=sim,bora.gpu=H100-SXM", "{}"
        worker = ["--address", self.address, "--resources", resources, "--labels", labels]
        self._start_node(name, [*worker, "--num-gpus", str(self._gpus)])

    def _start_node(self, name: str, arguments: Sequence[str]) -> None:
        agent, agent_grpc, metrics = free_ports(3)
        command = [*_RAY, "--include-log-monitor=false", "--node-ip-address", _HOST, *arguments]
        command += ["--object-store-memory", str(100 * 2**20), "--num-cpus", "4"]
        command += ["--dashboard-agent-listen-port", str(agent)]
        command += ["--dashboard-agent-grpc-port", str(agent_grpc)]
        command += ["--metrics-export-port", str(metrics)]
        for left in reversed(range(_TRIES)):
            try:
                self._try_node(name, command)
            except CannotRun:
                if not left:
                    raise
                self.kill_node(name)  # Ray gives up after 30 s, which a busy machine may need
            else:
                return

    def _try_node(self, name: str, command: Sequence[str]) -> None:
        log = self._folder / f"{name}-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**self.env, **self._env_of.get(name, {}), _MARK: f"{self._mark}-{name}"},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + _START_S
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise CannotRun(f"the Ray node {name} did not start: {last_line(log)}")
            time.sleep(0.1)

    def pids(self, node: str = "") -> list[int]:
        """Every live process of a node, or of all: what descends from it carries its mark."""
        mark = f"{_MARK}={self._mark}-{node}".encode()
        ends = (b"\0",) if node else (b"",)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    environment = (entry / "environ").read_bytes() + b"\0"
                    if any(mark + end in environment for end in ends):
                        found.append(int(entry.name))
        return found

    def pid_of(self, actor: str) -> int:
        """Of the Ray actor of that class name; Ray names worker processes after what they run.

        Raises:
            CannotRun: there is none.
        """
        for pid in self.pids():
            if _command(pid).startswith(f"ray::{actor}"):
                return pid
        raise CannotRun(f"no process of {actor}")

    def pid_with(self, words: str) -> int:
        """Of the process whose command line holds `words`, not counting one that guards it.

        Raises:
            CannotRun: there is none.
        """
        for pid in self.pids_with(words):
            return pid
        raise CannotRun(f"no process with {words!r} in its command line")

    def pids_with(self, words: str, node: str = "") -> list[int]:
        """Those of a node, or of all, whose command lines hold `words`, without their guards."""
        commands = {pid: _command(pid) for pid in self.pids(node)}
        return [pid for pid, each in commands.items() if words in each and "guard.py" not in each]

    def kill_node(self, name: str) -> None:
        """All of its processes at once, as when its power fails."""
        for pid in self.pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End every process of it."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for process in self._started:
            process.wait()

    def bora(self, *arguments: str, timeout_s: float = 180.0) -> str:
        """What a command of bora prints.

        Raises:
            CannotRun: it failed.
        """
        result = subprocess.run(
            [*_BORA, *arguments],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if result.returncode != 0:
            raise CannotRun(f"bora {' '.join(arguments)}: {result.stderr.strip()}")
        return result.stdout

    async def status(self) -> Mapping[str, Any]:
        """`bora status --json`; empty while no controller answers."""
        with contextlib.suppress(CannotRun):
            text = await asyncio.to_thread(self.bora, "status", "--json")
            status: dict[str, Any] = json.loads(text)
            return status
        return {}


@contextlib.contextmanager
def drill_cluster(
    temporary: Path,
    *,
    workers: Sequence[str],
    slots: int,
    gpus: int = 0,
    env: Mapping[str, str] | None = None,
    env_of: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[DrillCluster]:
    """A running cluster, ended by process id in any case; as `DrillCluster`.

    Raises:
        CannotRun: it does not come up.
    """
    cluster = DrillCluster(
        temporary, workers=workers, slots=slots, gpus=gpus, env=env, env_of=env_of
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _command(pid: int) -> str:
    try:
        raw = (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace")
