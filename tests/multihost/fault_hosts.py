"""A cluster of lab hosts to be hurt: its head keeps its state in Redis, and one host can be spared."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.cluster_file import HEAD_SETTINGS, OnPremCluster, onprem_yaml, pools_of
from cluster.control_api import ControlClient
from cluster.errors import ClusterError
from loadtests.drill_cluster import ENGINE_DELAY_S
from placement.catalogue import load_catalogue
from tests.debian_packages import install_missing
from tests.multihost.conftest import PYTHON, ROOT, furnish, live_nodes, without_dashboard
from tests.multihost.lab import OPERATOR, Lab, running_lab
from tests.system.harness import eventually

MODEL = "chat"
REPLICAS = 2
WORKERS = ("w1", "w2", "w3")  # one GPU each
FRONT = "front"  # a gateway and no engine
HOSTS = ("store", "head", FRONT, *WORKERS)
_PASSWORD = "of-the-lab"
_REDIS_PORT = 6379
_SLOW_START = {"RAY_raylet_start_wait_time_s": 120, "RAY_agent_register_timeout_ms": 120_000}
_FLEET = f"""
fleet: faults
models:
  - name: {MODEL}
    model: mistral-7b-v0.3
    engine: sim
    pools: [h100]
    tensor_parallel_size: 1
    max_model_len: 8192
    max_num_seqs: 32
    replicas: {{min: {REPLICAS}, max: {REPLICAS}}}
    engine_args: [--sim-speed=2, --sim-start-delay-s={ENGINE_DELAY_S:g}]
gateway: {{http_port: 8000, grpc_port: 8001, host: 0.0.0.0, replicas: 2}}
"""
_PARTS = {
    "engine": "-m cluster.engines.sim_server",
    "replica": "ray::ServeReplica",
    "gateway": "-m gateway",
    "controller": "ray::ControllerActor",
    "Ray node": "raylet/raylet",
}


class FaultHosts:
    """A lab with bora on it. `head_folder` is the home folder of the head."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.url = f"http://{lab.address(FRONT)}:8000"
        self.head_folder = lab.hosts["head"].folder / "root"
        self._context: Mapping[str, Any] = {}  # for commands, which the head's disk keeps

    def start(self) -> None:
        """Redis, `ray up` and `bora deploy`."""
        home = furnish(self.lab, _cluster_file(self.lab))
        (home / ".ray" / "redis_password").write_text(_PASSWORD)
        self.lab.run("store", f"{_redis(self.lab)} --daemonize yes > /dev/null 2>&1")
        self.ray_up()
        (self.head_folder / "fleet.yaml").write_text(_FLEET)
        eventually(lambda: len(self.nodes()) == len(HOSTS) - 1, 120, 1.0)
        head = self.lab.address("head")
        self.lab.run("head", f"cd bora && {PYTHON} -m cluster deploy ~/fleet.yaml "
                     f"--address {head}:6379", timeout_s=240)  # fmt: skip
        context = self.head_folder / ".local/state/bora/context.json"
        self._context = json.loads(context.read_text())

    def ray_up(self) -> None:
        """On the operator's host; also brings a head back."""
        self.lab.run(OPERATOR, "ray up -y lab.yaml 2>&1", timeout_s=240)

    def ray_down(self) -> None:
        """The same way."""
        self.lab.run(OPERATOR, "ray down -y lab.yaml 2>&1", timeout_s=240)

    def kept(self) -> list[str]:
        """What is in Redis."""
        address = f"-h {self.lab.address('store')} -p {_REDIS_PORT}"
        ask = f"redis-cli {address} -a {_PASSWORD} --no-auth-warning keys '*'"
        return self.lab.run("store", ask).split()

    def nodes(self) -> list[str]:
        """Addresses of Ray's live nodes; none where no head answers."""
        return live_nodes(self.lab, "NodeManagerAddress")

    def status(self) -> Mapping[str, Any]:
        """What the controller says; empty while none answers. On the operator's network only."""
        with contextlib.suppress(ClusterError, OSError, ValueError):
            url, token = self._context["controller_url"], self._context["token"]
            client = ControlClient(url, token, timeout_s=2.0)
            found: Mapping[str, Any] = client.status().model_dump(mode="json")
            return found
        return {}

    def ready(self) -> dict[str, str]:
        """Replicas that serve, with the host of each."""
        replicas = [r for v in self.status().get("variants", ()) for r in v["replicas"]]
        return {r["replica"]: r["node"] for r in replicas if r["state"] == "ready"}

    def parts(self) -> dict[str, set[str]]:
        """Processes by what they are: host, id, start."""
        found: dict[str, set[str]] = {name: set() for name in _PARTS}
        for host in ("head", FRONT, *WORKERS):
            if not self.lab.hosts[host].init:
                continue
            for line in self.lab.run(host, "ps -eo pid=,lstart=,args=").splitlines():
                words = line.split()
                for name, mark in _PARTS.items():
                    if mark in line and "guard.py" not in line and words[6] != "bash":
                        found[name].add(" ".join([host, *words[:6]]))
        return found


@contextlib.contextmanager
def fault_hosts() -> Iterator[FaultHosts]:
    """A cluster that serves, on hosts that end with the block."""
    install_missing()
    with running_lab(*HOSTS, shown=[ROOT]) as lab:
        hosts = FaultHosts(lab)
        hosts.start()
        yield hosts


def why_not() -> str:
    """Why this machine has no such hosts; empty: it may have."""
    if os.geteuid() != 0:
        return "hosts with their own networks need root"
    return "" if Path("/proc/self/ns/net").exists() else "this kernel has no network namespaces"


def _redis(lab: Lab) -> str:
    address = f"--bind {lab.address('store')} --port {_REDIS_PORT}"
    return f"redis-server {address} --requirepass {_PASSWORD} --appendonly yes --dir /root"


def _cluster_file(lab: Lab) -> dict[str, Any]:
    """As `bora cluster init --redis` writes it, with a host for a gateway beside the pool."""
    catalogue = load_catalogue()
    workers = ",".join(lab.address(name) for name in WORKERS)
    wanted = OnPremCluster(
        name="faults",
        head=lab.address("head"),
        pools=pools_of([f"h100=H100-SXM:1@{workers}"], catalogue),
        ssh_user="root",
        ssh_key="~/.ssh/lab_key",
        code=str(ROOT),
        # All of them start on this machine's few cores, where Ray's own 30 s may not do.
        settings={**HEAD_SETTINGS, **_SLOW_START},
        redis=f"{lab.address('store')}:{_REDIS_PORT}",
    )
    cluster: dict[str, Any] = yaml.safe_load(onprem_yaml(wanted, catalogue))
    types = cluster["available_node_types"]
    types[FRONT] = {**types["head"], "min_workers": 1, "max_workers": 1}
    cluster["provider"]["pools"][FRONT] = [lab.address(FRONT)]
    cluster["provider"]["drain_s"] = 5
    without_dashboard(cluster)
    cluster["max_workers"] = len(WORKERS) + 1
    return cluster
