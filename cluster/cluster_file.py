"""Cluster files for `ray up`, as text with comments that say what to edit."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.head_store import ADDRESS_VARIABLE, NAMESPACE_VARIABLE
from cluster.names import GPU_LABEL, KV_CACHE_LABEL, MEMORY_LABEL, POOL_LABEL, SLOT
from cluster.provider_config import require_address, require_name
from cluster.ray_settings import NO_LOG_MONITOR
from placement.catalogue import CONFIGS, Catalogue, GpuType
from placement.errors import ConfigError

ACCELERATOR_LABEL = "ray.io/accelerator-type"
SHIPPED = ("cluster", "configs", "gateway", "loadtests", "placement", "requirements")
SHIPPED_FILES = ("README.md", "pyproject.toml")

# On every host: after how long a connection to a dead host is given up, not after Ray's two minutes.
# Ray makes one placement group at a time, so one that a dying host was to hold would stop all others.
NODE_SETTINGS = {"RAY_grpc_client_keepalive_timeout_ms": 5000}
# A host that dies is known after 9 s, with Ray's own settings after 15 to 65 s.
HEALTH_SETTINGS = {
    **NODE_SETTINGS,
    "RAY_health_check_period_ms": 1000,
    "RAY_health_check_timeout_ms": 2000,
    "RAY_health_check_failure_threshold": 3,
}
_SILENT = "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"
# Where hosts are there already: how long they, and the head's own start, may take to answer.
HEAD_SETTINGS = {**HEALTH_SETTINGS, "AUTOSCALER_UPDATE_INTERVAL_S": 1, _SILENT: 30}
# With Redis, on every host: how long to wait for a head that is down, engines serving.
KEPT_SETTINGS = {"RAY_gcs_rpc_server_reconnect_timeout_s": 86400}
# On the head: its predecessor's node is known as dead after 4 s, and then the controller moves; a
# replica that Serve has not found again after 30 s, which is its own setting, would be restarted.
KEPT_HEAD_SETTINGS = {
    **KEPT_SETTINGS,
    "RAY_health_check_initial_delay_ms": 1000,
    "RAY_SERVE_SLOW_STARTUP_WARNING_S": 300,
}
REDIS_PASSWORD_FILE = "~/.ray/redis_password"  # noqa: S105 - a path
_HEAD_TYPE = "head"
_COUNT = re.compile(r"[1-9][0-9]{0,2}")  # GPUs of a host
_DEFAULTS: dict[str, Any] = {
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "initialization_commands": [],
    "setup_commands": [],
    "docker": {},
    "rsync_filter": [],
}
_HEAD = """\
# Ray on hosts of your own: `ray up -y FILE` starts the head over ssh, and the head starts the pools.
# On the head then `bora deploy FLEET --address HEAD:6379`; `ray down -y FILE` ends it all.
# Before: Python 3.11, rsync and an ssh key on every host; `ray get-auth-token --generate` here.
"""
_KEPT = """\
# Engines and gateways serve on while the head is down; `ray up -y FILE` again brings it back, on its
# host or one that took over its address and bora's state folder. EDIT: the address of a Redis server
# (not on the head, `appendonly yes`) in the head's start command; its password is in
# ~/.ray/redis_password here.
"""
_SIZES = "# All hosts of a pool start at once; those beyond min_workers go when idle.\n"
_PROVIDER = """\
# EDIT: addresses by which all hosts reach each other. A pool is a node type of that name; drain_s is
# how long streams may go on when a host is stopped.
"""
_AUTH = "# EDIT: an account that may log in everywhere. The key is copied to the head.\n"
_TYPES = """\
# EDIT: CPUs and GPUs of a host. With a smaller min_workers the others start when replicas ask for them
# (`bora deploy FLEET --inventory FILE`, which names all).
"""
_CODE = "# bora's code, and the token without which Ray answers nobody.\n"
_SETUP = """\
# From the lock file; again only when that changes. EDIT: `PYTHON=python3.11 sh ...` where python3 is
# older.
"""
_START = "# Token authentication; a host that dies is known after 9 s.\n"
_START_SILENT = """\
# Of a pool whose hosts are all silent Ray asks no more after 30 s, if another pool serves as well.
"""
# Requests do not go through Ray, which needs little memory. Its agents' ports are fixed: for one that
# they choose themselves a node waits 15 s and then ends, too short for a busy host.
_NODE = (
    "--object-store-memory=200000000 --dashboard-agent-grpc-port=6380"
    f" --runtime-env-agent-port=6381 --metrics-export-port=6382 {NO_LOG_MONITOR}"
)


@dataclass(frozen=True, slots=True)
class HostPool:
    """Hosts that are alike."""

    name: str
    gpu: str  # type in the catalogue
    gpus_per_host: int
    hosts: tuple[str, ...]
    cpus: int = 16


@dataclass(frozen=True, slots=True)
class OnPremCluster:
    """What `bora cluster init` asks for."""

    name: str
    head: str
    pools: tuple[HostPool, ...]
    ssh_user: str = "ubuntu"
    ssh_key: str = "~/.ssh/id_ed25519"
    code: str = "."  # folder of bora's code on the operator's machine
    settings: dict[str, int] = field(default_factory=lambda: dict(HEAD_SETTINGS))
    redis: str = ""  # HOST:PORT where the head's state outlives it


def parse_pool(text: str, catalogue: Catalogue) -> HostPool:
    """`NAME=GPU:COUNT@HOST,HOST`, as h100=H100-SXM:8@10.0.0.21,10.0.0.22.

    Raises:
        ConfigError: another form, or a name, a host or a count that cannot be.
        UnknownName: the GPU type is not known.
    """
    name, equals, rest = text.partition("=")
    what, at, hosts = rest.partition("@")
    gpu, _, count = what.partition(":")
    found = tuple(host.strip() for host in hosts.split(",") if host.strip())
    if not (equals and at and name and gpu and found and _COUNT.fullmatch(count or "1")):
        raise ConfigError(
            f"--pool {text}: NAME=GPU:COUNT@HOST,HOST is expected, for instance "
            f"h100=H100-SXM:8@10.0.0.21,10.0.0.22"
        )
    require_name(f"--pool {text}", name)
    if name == _HEAD_TYPE:
        raise ConfigError(f"--pool {text}: {name!r} is the head's own type; give another name")
    for host in found:
        require_address(f"--pool {text}", host)
    kind = catalogue.gpu(gpu).name
    if kind == "cpu":
        raise ConfigError(
            f"--pool {text}: hosts without GPUs are added by hand: a node type with the resource "
            f"{SLOT} instead of GPU, and the labels {GPU_LABEL}: cpu, {MEMORY_LABEL} and "
            f"{KV_CACHE_LABEL}, in GiB of a slot"
        )
    return HostPool(name, kind, int(count or 1), found)


def onprem_yaml(cluster: OnPremCluster, catalogue: Catalogue) -> str:
    """The whole file."""
    hosts = sum(len(pool.hosts) for pool in cluster.pools)
    types: dict[str, Any] = {
        _HEAD_TYPE: {"node_config": {}, "resources": {"CPU": 4}, "labels": {}, "max_workers": 0}
    }
    for pool in cluster.pools:
        types[pool.name] = node_type(pool, catalogue.gpu(pool.gpu))
    provider = {
        "type": "external",
        "module": "cluster.provider.OnPremProvider",
        "head": cluster.head,
        "pools": {pool.name: list(pool.hosts) for pool in cluster.pools},
        "drain_s": 60,
    }
    sizes = {"max_workers": hosts, "upscaling_speed": 100.0, "idle_timeout_minutes": 10}
    auth = {"ssh_user": cluster.ssh_user, "ssh_private_key": cluster.ssh_key}
    return "".join(
        [
            _HEAD,
            _KEPT if cluster.redis else "",
            _block("cluster_name", cluster.name),
            _SIZES,
            *(_block(key, value) for key, value in sizes.items()),
            _PROVIDER,
            _block("provider", provider),
            _AUTH,
            _block("auth", auth),
            _TYPES,
            _block("available_node_types", types),
            _block("head_node_type", _HEAD_TYPE),
            _shared(cluster),
            "# An external provider has no defaults of its own.\n",
            *(_block(key, value) for key, value in _DEFAULTS.items()),
        ]
    )


def node_type(pool: HostPool, gpu: GpuType) -> dict[str, Any]:
    """Resources and labels by which bora and Ray know the pool's hosts."""
    resources: dict[str, int] = {"CPU": pool.cpus, "GPU": pool.gpus_per_host}
    labels = {POOL_LABEL: pool.name, GPU_LABEL: gpu.name}
    if gpu.ray_accelerator_type is not None:
        resources[f"accelerator_type:{gpu.ray_accelerator_type}"] = 1
        labels[ACCELERATOR_LABEL] = gpu.ray_accelerator_type
    count = len(pool.hosts)
    return {
        "node_config": {},
        "resources": resources,
        "labels": labels,
        "min_workers": count,
        "max_workers": count,
    }


def start_commands(
    cluster: str, settings: dict[str, int], redis: str = ""
) -> tuple[list[str], list[str]]:
    """For the head and for the others: nothing restarts where nothing has changed."""
    node = "~/bora/.venv/bin/python -m cluster.ray_node start --cluster " + cluster
    start = "cd ~/bora && RAY_AUTH_MODE=token"
    kept = f"{ADDRESS_VARIABLE}={redis} {NAMESPACE_VARIABLE}={cluster} " if redis else ""
    password = f"--redis-password=$(cat {REDIS_PASSWORD_FILE}) " if redis else ""
    told = _told({**settings, **(KEPT_HEAD_SETTINGS if redis else {})})
    head = (
        f"{start} {kept}{told}{node} -- ray start --head --port=6379 {password}"
        "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
        f" {_NODE}"
    )
    worker = (
        f"{start} {_told({**NODE_SETTINGS, **(KEPT_SETTINGS if redis else {})})}{node} -- ray start"
    )
    return [head], [f"{worker} --address=$RAY_HEAD_IP:6379 {_NODE}"]


def _told(settings: dict[str, int]) -> str:
    return "".join(f"{name}={value} " for name, value in settings.items())


def _shared(cluster: OnPremCluster) -> str:
    mounts = {
        f"~/bora/{name}": str(Path(cluster.code) / name) for name in (*SHIPPED, *SHIPPED_FILES)
    }
    secrets = ["~/.ray/auth_token", *([REDIS_PASSWORD_FILE] if cluster.redis else [])]
    mounts |= {path: path for path in secrets}
    head, worker = start_commands(cluster.name, cluster.settings, cluster.redis)
    return "".join(
        [
            _CODE,
            _block("file_mounts", mounts, flow=False),
            _block("rsync_exclude", ["**/__pycache__"]),
            _SETUP,
            _block("head_setup_commands", ["cd ~/bora && sh requirements/node.sh cpu"], flow=False),
            _block(
                "worker_setup_commands", ["cd ~/bora && sh requirements/node.sh gpu"], flow=False
            ),
            _START + (_START_SILENT if _SILENT in cluster.settings else ""),
            _block("head_start_ray_commands", head, flow=False),
            _block("worker_start_ray_commands", worker, flow=False),
        ]
    )


def renamed(text: str, shipped: str, name: str) -> str:
    """A shipped file, as text, of a cluster that is called `name`, with the code where it is here.

    `shipped`: what it is called there. A name that YAML takes for something else is quoted.
    """
    quoted = yaml.safe_dump(name).removesuffix("...\n").strip()
    value = re.compile(rf"^((?:cluster_name|metadata): (?:{{name: )?){shipped}\b", re.MULTILINE)
    text = value.sub(lambda found: found[1] + quoted, text)
    text = re.sub(rf"--cluster {shipped} ", f"--cluster {name} ", text)
    mount = re.compile(r"^(  ~/bora/\S+: )(\S+)$", re.MULTILINE)
    return mount.sub(lambda found: found[1] + json.dumps(str(CONFIGS.parent / found[2])), text)


def _block(key: str, value: Any, *, flow: bool | None = None) -> str:
    """`key: value` as YAML; inner lists and mappings in one line, unless `flow` is False."""
    text = str(yaml.safe_dump({key: value}, sort_keys=False, width=100000, default_flow_style=flow))
    return text[1:-2] + "\n" if text.startswith("{") else text


def pools_of(texts: Sequence[str], catalogue: Catalogue) -> tuple[HostPool, ...]:
    """Each parsed; names differ.

    Raises:
        ConfigError: a form is wrong, or two pools share a name.
        UnknownName: a GPU type is not known.
    """
    pools = tuple(parse_pool(text, catalogue) for text in texts)
    names = [pool.name for pool in pools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--pool: two pools are called {twice!r}")
    return pools
