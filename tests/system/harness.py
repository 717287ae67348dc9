"""Starts bora as a user does, in a state folder of its own, and knows every process of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.context import Context
from cluster.control_api import ControlClient
from loadtests.drill_cluster_processes import DrillCluster, drill_cluster
from loadtests.drill_processes import free_ports
from loadtests.steady_streams import SteadyStreams

BORA = [sys.executable, "-m", "cluster"]


PATIENCE_S = 300.0  # many times what anything here takes: it ends what never comes


def eventually(
    condition: Callable[[], Any], timeout_s: float = PATIENCE_S, period_s: float = 0.2
) -> Any:
    """The first true value of `condition`, however slow the machine; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        time.sleep(period_s)


@contextlib.contextmanager
def served(
    fleet: str, *, workers: Sequence[str], slots: int, gpus: int = 0
) -> Iterator[tuple[DrillCluster, str]]:
    """A cluster of several Ray nodes with a fleet on it, and its gateway's URL.

    `fleet` is YAML with places for the ports `http` and `grpc`.
    """
    http, grpc = free_ports(2)
    with (
        tempfile.TemporaryDirectory(prefix="bora-ray-") as folder,
        drill_cluster(Path(folder), workers=workers, slots=slots, gpus=gpus) as cluster,
    ):
        file = Path(folder) / "fleet.yaml"
        file.write_text(fleet.format(http=http, grpc=grpc))
        cluster.bora("deploy", str(file), "--address", cluster.address)
        yield cluster, f"http://127.0.0.1:{http}"


def steady_streams(url: str) -> SteadyStreams:
    """A slow machine is no gateway that does not answer."""
    return SteadyStreams(url, "chat", patience_s=PATIENCE_S, sample_timeout_s=PATIENCE_S)


class Bora:
    """One `bora up` in its own state folder and on its own ports."""

    def __init__(self, state: Path, *arguments: str, http_port: int | None = None) -> None:
        self.state = state
        self.http_port, self.grpc_port = free_ports(2)
        self.http_port = http_port or self.http_port
        self.env = {**os.environ, "BORA_STATE": str(state)}
        ports = ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        self.output = state.parent / f"{state.name}.out"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*BORA, "up", *arguments, *ports],
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def said(self) -> str:
        return self.output.read_text()

    def wait_ready(self, timeout_s: float = PATIENCE_S) -> None:
        self.wait_until(lambda: "ready after" in self.said(), timeout_s)

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
        """Wait for `condition`; fails at once when `bora up` ends before."""
        eventually(lambda: condition() or self.process.poll() is not None, timeout_s)
        assert self.process.poll() is None, self.said()

    def command(
        self, *arguments: str, timeout_s: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BORA, *arguments],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def control(self) -> ControlClient:
        """What the command line talks to, without its start of a second."""
        context = Context.model_validate_json((self.state / "context.json").read_bytes())
        return ControlClient(context.controller_url, context.token)

    def status(self) -> dict[str, Any]:
        return self.control().status().model_dump(mode="json")

    def variant(self, model: str) -> dict[str, Any]:
        return next(variant for variant in self.status()["variants"] if variant["model"] == model)

    def settled(self, model: str) -> list[dict[str, Any]]:
        """Its replicas, once all of them serve: none still starts, or drains."""

        def replicas() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = self.variant(model)["replicas"]
            return found if {each["state"] for each in found} == {"ready"} else []

        settled: list[dict[str, Any]] = eventually(replicas)
        return settled

    def processes(self) -> list[int]:
        """Every live process that descends from this `bora up`, wherever it went.

        They all inherit the name of the state folder in their environment.
        """
        marker = f"BORA_STATE={self.state}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if marker in (entry / "environ").read_bytes() + b"\0":
                        found.append(int(entry.name))
        return found

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.ended()

    def ended(self) -> int:
        """Wait until `bora up` has ended; its exit status."""
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def running_bora(state: Path, *arguments: str, http_port: int | None = None) -> Iterator[Bora]:
    """`bora up ARGUMENTS`, ended in any case, by process id."""
    bora = Bora(state, *arguments, http_port=http_port)
    try:
        yield bora
    finally:
        try:
            if bora.process.poll() is None:
                bora.interrupt()
        finally:  # what hangs, or was left, must not be in the next test's way
            for pid in bora.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
