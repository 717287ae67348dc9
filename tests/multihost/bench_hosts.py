"""A cluster of many lab hosts to be measured: `ray up`, with patience for hosts that share a machine."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cluster.cluster_file import HEAD_SETTINGS, OnPremCluster, onprem_yaml
from cluster.control_api import ControlClient
from cluster.errors import ClusterError
from cluster.messages import FleetStatus, ReplicaState, ReplicaStatus
from placement.catalogue import load_catalogue
from tests.debian_packages import install_missing
from tests.multihost.conftest import PYTHON, ROOT, furnish, live_nodes, without_dashboard
from tests.multihost.lab import OPERATOR, Lab, running_lab

HTTP_PORT = 8000
_POOL = "sim"
_FLEET = "fleet.yaml"
# Hundreds of processes that start share two cores: a host that is late is not given up.
_HEAD_SETTINGS = {
    **HEAD_SETTINGS,
    "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": 600,
}
_NODE_SETTINGS = {
    # Processes that wait for work take the memory of replicas here.
    "RAY_enable_worker_prestart": 0,
    "RAY_prestart_worker_first_driver": 0,
    # A dozen hosts that start a hundred processes in one moment share two cores.
    "RAY_worker_maximum_startup_concurrency": 1,
    # Ray ends workers at 95 % of the memory, of which swap is no part.
    "RAY_memory_monitor_refresh_ms": 0,
}


class BenchHosts:
    """`workers` have `slots` each for a simulated engine. Call on the operator's network."""

    def __init__(self, lab: Lab, workers: Sequence[str], slots: int, gateways: int) -> None:
        self.lab = lab
        self.workers = tuple(workers)
        self.slots = slots
        self._gateways = gateways
        self._home = lab.hosts["head"].folder / "root"

    def start(self) -> None:
        """`ray up`; returns before the workers have joined."""
        furnish(self.lab, self._cluster_file())
        self.lab.run(OPERATOR, "ray up -y lab.yaml 2>&1", timeout_s=240)

    @property
    def gateways(self) -> list[str]:
        """Beside the controller, and on the workers whose addresses come first as text."""
        others = sorted(self.lab.address(name) for name in self.workers)[: self._gateways - 1]
        addresses = (self.lab.address("head"), *others)
        return [f"http://{address}:{HTTP_PORT}" for address in addresses]

    def nodes(self) -> set[str]:
        """Names of the hosts on which Ray runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return set(live_nodes(self.lab, "NodeManagerHostname"))
        return set()

    def deploy(self, models: str, log: Path) -> subprocess.Popen[bytes]:
        """`bora deploy` of those models, as a process on the head that has begun."""
        gateway = f"{{http_port: {HTTP_PORT}, grpc_port: 8001, host: 0.0.0.0, replicas: {self._gateways}}}"
        (self._home / _FLEET).write_text(f"fleet: bench\nmodels:{models}gateway: {gateway}\n")
        address = f"{self.lab.address('head')}:6379"
        shell = f"cd bora && {PYTHON} -m cluster deploy ~/{_FLEET} --address {address}"
        with log.open("wb") as output:
            return subprocess.Popen(
                self.lab.command("head", shell),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @cached_property
    def controller(self) -> ControlClient:
        """Once something is deployed."""
        context = json.loads((self._home / ".local/state/bora/context.json").read_text())
        return ControlClient(context["controller_url"], context["token"], timeout_s=20.0)

    def status(self) -> FleetStatus | None:
        """None while the controller does not answer."""
        with contextlib.suppress(ClusterError):
            return self.controller.status()
        return None

    def replicas(self, state: ReplicaState = "ready") -> list[ReplicaStatus]:
        """Those in that state."""
        status = self.status()
        replicas = [each for v in status.variants for each in v.replicas] if status else []
        return [each for each in replicas if each.state == state]

    def pids(self, host: str, title: str = "") -> list[int]:
        """Processes of a host whose command line begins so, as this machine numbers them."""
        own = _process_table(self.lab.hosts[host].init)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    begins = (entry / "cmdline").read_bytes().startswith(title.encode())
                    if begins and _process_table(int(entry.name)) == own:
                        found.append(int(entry.name))
        return found

    def _cluster_file(self) -> Mapping[str, Any]:
        """As `bora cluster init` writes it, with a pool of hosts without GPUs."""
        wanted = OnPremCluster(
            name="bench",
            head=self.lab.address("head"),
            pools=(),
            ssh_user="root",
            ssh_key="~/.ssh/lab_key",
            code=str(ROOT),
            settings=_HEAD_SETTINGS,
        )
        cluster: dict[str, Any] = yaml.safe_load(onprem_yaml(wanted, load_catalogue()))
        labels = {"bora.pool": _POOL, "bora.gpu": "cpu"}
        labels |= {"bora.memory-gib": "2", "bora.kv-cache-gib": "1"}
        cluster["available_node_types"][_POOL] = {
            "node_config": {},
            "resources": {"CPU": 2, "bora_slot": self.slots},
            "labels": labels,
            "min_workers": len(self.workers),
            "max_workers": len(self.workers),
        }
        cluster["provider"]["pools"][_POOL] = [self.lab.address(name) for name in self.workers]
        cluster["provider"]["drain_s"] = 5
        cluster["max_workers"] = len(self.workers)
        told = " ".join(f"{name}={value}" for name, value in _NODE_SETTINGS.items())
        for kind in ("head", "worker"):
            key = f"{kind}_start_ray_commands"
            cluster[key] = [f"export {told}; {command}" for command in cluster[key]]
        without_dashboard(cluster)
        return cluster


@contextlib.contextmanager
def bench_hosts(workers: int, slots: int, gateways: int) -> Iterator[BenchHosts]:
    """A cluster whose workers start, on hosts that end with the block."""
    install_missing()
    names = [f"w{number}" for number in range(1, workers + 1)]
    with running_lab("head", *names, shown=[ROOT]) as lab:
        hosts = BenchHosts(lab, names, slots, gateways)
        hosts.start()
        yield hosts


def _process_table(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/pid").readlink())
