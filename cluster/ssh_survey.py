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

from pydantic import ValidationError

from cluster.diagnosis import Check
from cluster.host_report import HostReport
from cluster.names import GPU_LABEL, KV_CACHE_LABEL, MEMORY_LABEL, POOL_LABEL, SLOT
from cluster.provider_config import checked_cluster
from cluster.ssh import ssh_command
from placement.errors import ConfigError
from placement.fleet import GatewaySpec
from placement.inventory import Inventory, Pool
from placement.yaml_document import compose, plain_value

TIMEOUT_S = 240.0
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
    proxy_command: str | None
    folder: str
    python: str

    @property
    def hosts(self) -> dict[str, str]:
        """Pool by address; that of a head which does not serve is empty."""
        pooled = {host: pool for pool, hosts in self.pools.items() for host in hosts}
        return {self.head: "", **pooled}


def read_cluster(path: Path) -> ClusterHosts:
    """The hosts of a cluster file whose provider lists them.

    Raises:
        ConfigError: the file cannot be read, `ray up` would refuse it, or its hosts are rented and
            not in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    document = plain_value(compose(text, str(path)), str(path))
    given = document.get("provider") if isinstance(document, dict) else None
    if not isinstance(given, dict) or given.get("type") != "external":
        raise ConfigError(
            f"{path}: expected a cluster file with provider: {{type: external, head: ..., pools: "
            f"...}}. Hosts that are rented are not in it: run `bora doctor` on the head after "
            f"`ray up`"
        )
    try:
        cluster = checked_cluster(document)
        provider, auth = cluster["provider"], cluster["auth"]
        serving = _serving(provider, cluster["available_node_types"])
        return ClusterHosts(
            head=provider["head"],
            pools=serving,
            inventory=_inventory(cluster["available_node_types"], provider, serving),
            user=auth["ssh_user"],
            key=auth["ssh_private_key"],
            port=provider["probe_port"],
            proxy_command=auth.get("ssh_proxy_command"),
            folder=provider["folder"],
            python=provider["python"],
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


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
        report = HostReport.model_validate_json(result.stdout.split("\n")[-2])
    except (ValidationError, IndexError):
        return None, check.model_copy(update=_misunderstood(result.stdout))
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


def _misunderstood(answer: str) -> dict[str, str]:
    """An answer that is no report."""
    found = f"its bora is of another version: {answer[-_LAST_WORDS:]!r}"
    cure = "ship the code: `ray up` does to the head, `ray down` and `ray up` to all hosts"
    if not answer.endswith("}\n"):
        found = f"its answer was cut off after {len(answer)} characters: {answer[-_LAST_WORDS:]!r}"
        cure = "ask again; is the way to it steady, and its disk full?"
    return {"status": "failed", "found": found, "cure": cure}


def _ssh(cluster: ClusterHosts, host: str, command: str) -> subprocess.CompletedProcess[str] | None:
    """None: it did not end in time."""
    asked = ssh_command(
        cluster.user, host, command,
        key=cluster.key, port=cluster.port, proxy_command=cluster.proxy_command,
    )  # fmt: skip
    try:
        return subprocess.run(
            asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
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
    said = result.stderr.strip()[-_LAST_WORDS:] or f"status {result.returncode}, without a word"
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


def _serving(provider: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Hosts by pool; the head is one of the pool that its labels name."""
    pools = {name: tuple(hosts) for name, hosts in provider["pools"].items()}
    label = (types[provider["head_node_type"]].get("labels") or {}).get(POOL_LABEL)
    return pools if label is None else {**pools, label: (provider["head"], *pools.get(label, ()))}


def _inventory(
    types: Mapping[str, Any], provider: Mapping[str, Any], serving: Mapping[str, Sequence[str]]
) -> Inventory | None:
    """What the node types promise: `bora.gpu` and a number of GPUs or slots."""
    declared = []
    for name, hosts in serving.items():
        of_head = name not in provider["pools"]
        key = provider["head_node_type"] if of_head else name
        pool = _pool(name, key, types[key], hosts)
        declared += [pool] if pool is not None else []
    return Inventory(pools=tuple(declared)) if declared else None


def _pool(name: str, key: str, node_type: Mapping[str, Any], hosts: Sequence[str]) -> Pool | None:
    """None: nothing is promised of it. `key`: the node type's name."""
    resources, labels = node_type.get("resources") or {}, node_type.get("labels") or {}
    if not hosts or GPU_LABEL not in labels:
        return None
    try:
        count = int(resources.get("GPU", 0) or resources.get(SLOT, 0))
        if count == 0:
            return None
        memory, cache = labels.get(MEMORY_LABEL), labels.get(KV_CACHE_LABEL)
        return Pool(
            name=name,
            gpu=labels[GPU_LABEL],
            nodes=len(hosts),
            gpus_per_node=count,
            memory_gib_per_gpu=float(memory) if memory else None,
            kv_cache_gib_per_gpu=float(cache) if cache else None,
            labels={each: str(value) for each, value in labels.items() if not _OURS.match(each)},
            node_names=tuple(hosts),
        )
    except (TypeError, ValueError, OverflowError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ConfigError(
            f"available_node_types.{key}: resources {resources} and labels {labels} describe no "
            f"pool: {told}"
        ) from error
