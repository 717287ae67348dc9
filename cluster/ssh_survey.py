"""Asks hosts of a cluster file over ssh, before or without Ray."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.diagnosis import Check
from cluster.host_report import HostReport
from cluster.names import GPU_LABEL, KV_CACHE_LABEL, MEMORY_LABEL, SLOT
from placement.errors import ConfigError
from placement.fleet import GatewaySpec
from placement.inventory import Inventory, Pool

TIMEOUT_S = 240.0
_CONNECT_S = 5
_PORTS = f"6379,{GatewaySpec().http_port},{GatewaySpec().grpc_port}"  # of Ray's head, of a gateway
_SSH_FAILED = 255
_RECEIVED_S = 0.5  # an answer is that old at most when it is read
_LAST_WORDS = 200
_OURS = re.compile(r"bora\.|ray\.io/")  # labels that no operator thought of


@dataclass(frozen=True, slots=True)
class ClusterHosts:
    """What a cluster file says of hosts that are there already."""

    head: str
    pools: Mapping[str, tuple[str, ...]]
    inventory: Inventory | None
    user: str
    key: str
    port: int
    folder: str
    python: str

    @property
    def hosts(self) -> dict[str, str]:
        """Pool by address; the head's is empty."""
        pooled = {host: pool for pool, hosts in self.pools.items() for host in hosts}
        return {self.head: "", **pooled}


def read_cluster(path: Path) -> ClusterHosts:
    """The hosts of a cluster file whose provider lists them.

    Raises:
        ConfigError: the file cannot be read, or its hosts are rented and not in it.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        provider, auth = document["provider"], document["auth"]
        pools = {name: tuple(hosts) for name, hosts in (provider.get("pools") or {}).items()}
        return ClusterHosts(
            head=str(provider["head"]),
            pools=pools,
            inventory=_inventory(document.get("available_node_types") or {}, pools),
            user=str(auth["ssh_user"]),
            key=str(auth.get("ssh_private_key") or ""),
            port=int(provider.get("probe_port", 22)),
            folder=str(provider.get("folder", "~/bora")),
            python=str(provider.get("python", "~/bora/.venv/bin/python")),
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected a cluster file with provider.head, provider.pools and "
            f"auth.ssh_user ({type(error).__name__}: {error}). Hosts that are rented are not in "
            f"it: run `bora doctor` on the head after `ray up`"
        ) from error


def ask_hosts(
    cluster: ClusterHosts, progress: Callable[[str], None], *, quick: bool
) -> tuple[list[HostReport], list[Check]]:
    """Reports of all hosts at once, and a check for each whether it let us in and knows bora."""

    def ask(item: tuple[str, str]) -> tuple[HostReport | None, Check]:
        answer = _ask(cluster, item[0], item[1], quick=quick)
        progress(f"{item[0]}: {answer[1].found}")
        return answer

    with ThreadPoolExecutor(16) as executor:
        answers = list(executor.map(ask, cluster.hosts.items()))
    return [report for report, _ in answers if report], [check for _, check in answers]


def _ask(
    cluster: ClusterHosts, host: str, pool: str, *, quick: bool
) -> tuple[HostReport | None, Check]:
    command = f"cd {cluster.folder} && {cluster.python} -m cluster.host_report --ports {_PORTS}"
    result = _ssh(cluster, host, command + (" --quick" if quick else ""))
    received_s = time.time()
    check = _told(cluster, host, result)
    if result is None or check.status == "failed":
        return None, check
    try:
        report = HostReport.model_validate_json(result.stdout.splitlines()[-1])
    except (ValidationError, IndexError):
        return None, check.model_copy(
            update={
                "status": "failed",
                "found": f"its bora is of another version: {result.stdout[:_LAST_WORDS]!r}",
                "cure": "`ray up` again ships the code",
            }
        )
    facts = report.facts.model_copy(
        update={
            "node": host,
            "host": host,  # as the file calls it
            "pool": pool,
            "address": host,
            "clock_offset_s": round(report.now_s - received_s + _RECEIVED_S / 2, 3),
            "clock_error_s": _RECEIVED_S,
        }
    )
    return report.model_copy(update={"facts": facts}), check


def _ssh(cluster: ClusterHosts, host: str, command: str) -> subprocess.CompletedProcess[str] | None:
    """None: it did not end in time. Host keys are not kept, as with `ray up`."""
    options = ["BatchMode=yes", f"ConnectTimeout={_CONNECT_S}", "StrictHostKeyChecking=no"]
    options += ["UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    arguments = [part for option in options for part in ("-o", option)]
    key = ["-i", str(Path(cluster.key).expanduser())] if cluster.key else []
    try:
        return subprocess.run(
            ["ssh", *arguments, *key, "-p", str(cluster.port), f"{cluster.user}@{host}", command],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    except FileNotFoundError:
        raise ConfigError("ssh is not installed here: install openssh-client") from None


def _told(
    cluster: ClusterHosts, host: str, result: subprocess.CompletedProcess[str] | None
) -> Check:
    """What the way to the host says."""
    if result is None:
        found = f"no answer within {TIMEOUT_S:.0f} s"
        cure = "log in and run `bora probe`: its disk or driver hangs"
        return Check(host=host, check="ssh", status="failed", found=found, cure=cure)
    said = result.stderr.strip()[-_LAST_WORDS:]
    if result.returncode == _SSH_FAILED:
        login = f"ssh -i {cluster.key or 'KEY'} -p {cluster.port} {cluster.user}@{host}"
        cure = f"`{login}` must work without a question: is it up, is sshd, is the key in its "
        cure += "authorized_keys?"
        return Check(host=host, check="ssh", status="failed", found=said, cure=cure)
    if result.returncode != 0:
        return Check(
            host=host,
            check="bora",
            status="failed",
            found=f"it lets us in, but its bora does not run: {said}",
            cure=f"`ray up` installs it into {shlex.quote(cluster.folder)} (python: "
            f"{cluster.python})",
        )
    return Check(host=host, check="ssh", status="ok", found=f"{cluster.user}@{host}")


def _inventory(types: Mapping[str, Any], pools: Mapping[str, Sequence[str]]) -> Inventory | None:
    """What the node types promise: `bora.gpu` and a number of GPUs or slots."""
    declared = []
    for name, hosts in pools.items():
        node_type = types[name]
        resources, labels = node_type.get("resources") or {}, node_type.get("labels") or {}
        count = int(resources.get("GPU", 0) or resources.get(SLOT, 0))
        if not hosts or count == 0 or GPU_LABEL not in labels:
            continue
        memory, cache = labels.get(MEMORY_LABEL), labels.get(KV_CACHE_LABEL)
        own = {key: str(value) for key, value in labels.items() if not _OURS.match(key)}
        declared.append(
            Pool(
                name=name,
                gpu=labels[GPU_LABEL],
                nodes=len(hosts),
                gpus_per_node=count,
                memory_gib_per_gpu=float(memory) if memory else None,
                kv_cache_gib_per_gpu=float(cache) if cache else None,
                labels=own,
                node_names=tuple(hosts),
            )
        )
    return Inventory(pools=tuple(declared)) if declared else None
