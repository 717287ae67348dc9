"""What a cluster file must say for hosts of our own, checked before anything is started."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, ValidationError

from placement.errors import ConfigError, nearest
from placement.spec import Spec

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")  # also a label's value for Ray
_PATH = re.compile(r"[~A-Za-z0-9._/+-]+")  # unquoted in a shell, for the sake of `~`
_ACCOUNT = re.compile(r"[^\s-]\S*")
_NODE = re.compile(r"cluster\.ray_node start --cluster (\S+)")
_SHOWN = 80


class OnPremConfig(Spec):
    """`provider` in the cluster file."""

    type: Literal["external"]
    module: str
    head: str = Field(min_length=1, description="Address of the head, from every host.")
    pools: Mapping[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Addresses of each pool's hosts."
    )
    folder: str = Field(default="~/bora", description="Where file_mounts put bora's code.")
    python: str = Field(default="~/bora/.venv/bin/python", description="On every host.")
    probe_port: int = Field(default=22, ge=1, le=65535, description="Asked whether a host is up.")
    gcs_port: int = Field(default=6379, ge=1, le=65535, description="Of `ray start --head`.")
    drain_s: NonNegativeFloat = Field(
        default=60.0, description="How long streams may go on when a host is stopped."
    )
    head_node_type: str = ""
    ssh: Mapping[str, str | None] = Field(default_factory=dict)
    on_head: bool = False


def checked_cluster(cluster: dict[str, Any]) -> dict[str, Any]:
    """`cluster` with the provider's defaults filled in.

    Raises:
        ConfigError: a key is missing or wrong, a pool has no node type or too few hosts, two nodes
            share a host, or the start commands belong to another cluster.
    """
    auth = _section(cluster, "auth", "{ssh_user: ubuntu, ssh_private_key: ~/.ssh/id_ed25519}")
    types = _section(cluster, "available_node_types", "a node type for the head and for each pool")
    head = cluster.get("head_node_type")
    if not isinstance(head, str) or head not in types:
        raise ConfigError(f"head_node_type: {head!r} is none of available_node_types{_of(types)}")
    require_name("cluster_name", cluster.get("cluster_name"))
    _require_login(auth)
    config = _provider(cluster)
    _require_addresses(config)
    _require_types(config, types, head, cluster.get("max_workers"))
    _require_own_commands(cluster, config)
    _require_no_containers(cluster, types)
    filled = config.model_dump(mode="json")
    filled["head_node_type"] = head
    filled["ssh"] = {
        "user": auth["ssh_user"],
        "key": auth["ssh_private_key"],
        "proxy_command": auth.get("ssh_proxy_command"),
    }
    sized = {name: _sized(types[name], len(hosts)) for name, hosts in config.pools.items()}
    return {
        **cluster,
        "provider": {**cluster["provider"], **filled},
        "available_node_types": {**types, **sized},
    }


def require_files(cluster: Mapping[str, Any]) -> None:
    """What `ray up` is about to copy is there; Ray itself says so late, and without a cure.

    Raises:
        ConfigError: the ssh key or a source of file_mounts is missing.
    """
    key = cluster["auth"]["ssh_private_key"]
    if not Path(key).expanduser().is_file():
        raise ConfigError(
            f"auth.ssh_private_key: there is no file {key}; give the path of a key that opens "
            f"every host (`ssh-keygen -t ed25519` makes one)"
        )
    for remote, local in (cluster.get("file_mounts") or {}).items():
        if not Path(str(local)).expanduser().exists():
            cure = f"paths count from the folder that `ray up` is run in, {Path.cwd()}"
            if str(local).endswith("auth_token"):
                cure = "`ray get-auth-token --generate` makes it"
            raise ConfigError(f"file_mounts.{remote}: there is no {local}; {cure}")


def require_address(where: str, host: str) -> None:
    """Refuse what ssh, rsync or Ray would take for something else.

    Raises:
        ConfigError: with the reason; `where` is the key.
    """
    if NAME.fullmatch(host) or (len(host) < 254 and all(map(NAME.fullmatch, host.split(".")))):
        return
    cure = "give a host's name or IPv4 address"
    if "@" in host:
        cure = "give the address alone; the account is auth.ssh_user"
    elif host.count(":") == 1:
        cure = "give the address alone; another port of sshd goes into ~/.ssh/config, here and on "
        cure += "the head, and into provider.probe_port"
    elif ":" in host:
        cure = (
            "Ray's launcher cannot write IPv6 addresses for rsync; give a name that stands for it"
        )
    raise ConfigError(f"{where}: {_short(host)} is no address; {cure}")


def require_name(where: str, name: object) -> None:
    """Names end up in labels, file names and shell commands.

    Raises:
        ConfigError: this one must not; `where` is the key.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {_short(name)} is no name: up to 63 of A-Z, a-z, 0-9, dot, dash and "
            f"underscore are expected, with a letter or digit at both ends"
        )


def require_distinct(owners: Iterable[tuple[str, str]]) -> None:
    """`owners`: hosts, and the key that each stands under.

    Raises:
        ConfigError: a host is there twice.
    """
    seen: dict[str, str] = {}
    for host, owner in owners:
        if host in seen:
            raise ConfigError(
                f"{owner}: {host} is also in {seen[host]}; Ray runs one node on a host (the head "
                f"may serve too: give its node type resources and labels)"
            )
        seen[host] = owner


def _section(cluster: Mapping[str, Any], key: str, wanted: str) -> dict[str, Any]:
    value = cluster.get(key)
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{key}: a mapping is expected, {wanted}; got {_short(value)}")
    return value


def _require_login(auth: Mapping[str, Any]) -> None:
    user, key = auth.get("ssh_user"), auth.get("ssh_private_key")
    if not isinstance(user, str) or not _ACCOUNT.fullmatch(user):
        raise ConfigError(
            f"auth.ssh_user: {_short(user)} is no account; give the one that may log in everywhere"
        )
    if not key or not isinstance(key, str):
        raise ConfigError(
            "auth.ssh_private_key is missing: the head reaches the pools with it (it is copied "
            "there); give the path of a key that opens every host"
        )


def _provider(cluster: Mapping[str, Any]) -> OnPremConfig:
    try:
        return OnPremConfig.model_validate(cluster.get("provider"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["provider", *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            close = nearest(str(first["loc"][-1]), OnPremConfig.model_fields)
            raise ConfigError(f"{where}: no such key{close}") from None
        told = {
            "tuple_type": "a list of addresses is expected, as in [10.0.0.21, 10.0.0.22]",
            "missing": "required, but missing",
        }.get(first["type"], first["msg"])
        raise ConfigError(f"{where}: {told}, got {_short(first['input'])}") from None


def _require_addresses(config: OnPremConfig) -> None:
    require_address("provider.head", config.head)
    owners = [(config.head, "provider.head")]
    for pool, hosts in config.pools.items():
        require_name("provider.pools", pool)
        for host in hosts:
            require_address(f"provider.pools.{pool}", host)
            owners.append((host, f"provider.pools.{pool}"))
    require_distinct(owners)
    for key, path in (("folder", config.folder), ("python", config.python)):
        if not _PATH.fullmatch(path):
            raise ConfigError(
                f"provider.{key}: {_short(path)} would be taken apart by a shell; give a path of "
                f"letters, digits and ~ . _ / + -"
            )


def _require_types(
    config: OnPremConfig, types: Mapping[str, Any], head: str, most: int | None
) -> None:
    """`most`: max_workers of the whole file, which Ray fills in where a type has none."""
    for name, node_type in types.items():
        parts = {"": node_type}
        if isinstance(node_type, dict):
            parts = {f".{key}": node_type.get(key) or {} for key in ("resources", "labels")}
        for key, part in parts.items():
            if not isinstance(part, dict):
                where = f"available_node_types.{name}{key}"
                raise ConfigError(f"{where}: a mapping is expected, got {_short(part)}")
    for key in ("min_workers", "max_workers"):
        if count := types[head].get(key):
            raise ConfigError(
                f"available_node_types.{head}.{key} is {count}, but that is the head's own type; "
                f"write 0, and hosts beside it as a pool with a type of its own"
            )
    pools = set(types) - {head}
    for name in sorted(pools ^ set(config.pools)):
        where, missing = ("provider.pools", "available_node_types")
        if name in pools:
            where, missing = missing, where
        raise ConfigError(f"{where} has {name!r}, {missing} has not; a pool needs both")
    for name, hosts in config.pools.items():
        _require_size(name, types[name], len(hosts), most)


def _require_size(name: str, node_type: Mapping[str, Any], hosts: int, most: int | None) -> None:
    where = f"available_node_types.{name}"
    least, wanted = node_type.get("min_workers") or 0, node_type.get("max_workers", most)
    for key, count in (("min_workers", least), ("max_workers", wanted)):
        if count is not None and (not isinstance(count, int) or count < 0):
            raise ConfigError(f"{where}.{key}: a number of hosts is expected, got {count!r}")
    if wanted is not None and wanted != most and wanted > hosts:
        raise ConfigError(
            f"{where}.max_workers is {wanted}, provider.pools.{name} has {hosts} hosts"
        )
    if least > min(hosts, hosts if wanted is None else wanted):
        raise ConfigError(
            f"{where}.min_workers is {least}, max_workers is {wanted} and provider.pools.{name} "
            f"has {hosts} hosts; min_workers cannot be more than either"
        )


def _sized(node_type: Mapping[str, Any], hosts: int) -> dict[str, Any]:
    """No more nodes than hosts: Ray fills in the whole file's max_workers where there is none."""
    wanted = node_type.get("max_workers")
    return {**node_type, "max_workers": hosts if wanted is None else min(wanted, hosts)}


def _require_own_commands(cluster: Mapping[str, Any], config: OnPremConfig) -> None:
    """`ray down` ends what carries the cluster's name; under another one all would be left."""
    name = cluster["cluster_name"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not config.pools and key.startswith("worker"):
            continue
        told = " ".join(str(command) for command in cluster.get(key) or ())
        found = _NODE.search(told)
        if found is None:
            raise ConfigError(
                f"{key}: `python -m cluster.ray_node start --cluster {name} -- ray start ...` is "
                f"expected, without which `ray down` finds no process (configs/clusters/)"
            )
        if found[1] != name:
            raise ConfigError(
                f"{key}: --cluster {found[1]} is not cluster_name, {name}; write the same in both"
            )
    port = re.search(r"--head .*?--port[= ](\d+)", " ".join(cluster["head_start_ray_commands"]))
    if port and int(port[1]) != config.gcs_port:
        raise ConfigError(
            f"provider.gcs_port is {config.gcs_port}, head_start_ray_commands has --port="
            f"{port[1]}; write the same in both"
        )


def _require_no_containers(cluster: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    places = {"docker": cluster.get("docker")} | {
        f"available_node_types.{name}.docker": node_type.get("docker")
        for name, node_type in types.items()
        if isinstance(node_type, dict)
    }
    for where, docker in places.items():
        if docker:
            raise ConfigError(
                f"{where}: bora's provider starts Ray on the hosts themselves; take it out, or "
                f"run the cluster on Kubernetes (configs/clusters/kuberay.yaml)"
            )


def _of(names: Iterable[object]) -> str:
    return f" ({', '.join(map(str, names))})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
