"""What a cluster file must say for hosts of our own, checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, ValidationError

from placement.errors import ConfigError
from placement.spec import Spec


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
        ConfigError: a key is wrong, a pool has no node type or too few hosts, or two nodes share
            a host.
    """
    auth, types = cluster["auth"], cluster["available_node_types"]
    if not auth.get("ssh_private_key"):
        raise ConfigError(
            "auth.ssh_private_key is missing: the head reaches the pools with it (it is copied "
            "there); give the path of a key that opens every host"
        )
    given = cluster["provider"]
    try:
        config = OnPremConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["provider", *map(str, first["loc"])])
        raise ConfigError(f"{where}: {first['msg']}, got {first['input']!r}") from None
    _require_types(config, types, cluster["head_node_type"])
    _require_distinct(config)
    filled = config.model_dump(mode="json")
    filled["head_node_type"] = cluster["head_node_type"]
    filled["ssh"] = {"user": auth["ssh_user"], "key": auth["ssh_private_key"]}
    return {**cluster, "provider": {**given, **filled}}


def _require_types(config: OnPremConfig, types: Mapping[str, Any], head: str) -> None:
    pools = set(types) - {head}
    for name in sorted(pools ^ set(config.pools)):
        where, missing = ("provider.pools", "available_node_types")
        if name in pools:
            where, missing = missing, where
        raise ConfigError(f"{where} has {name!r}, {missing} has not; a pool needs both")
    for name, hosts in config.pools.items():
        wanted = types[name].get("max_workers", len(hosts))
        if wanted > len(hosts):
            raise ConfigError(
                f"available_node_types.{name}.max_workers is {wanted}, provider.pools.{name} has "
                f"{len(hosts)} hosts"
            )


def _require_distinct(config: OnPremConfig) -> None:
    owners = {config.head: "provider.head"}
    for pool, hosts in config.pools.items():
        for host in hosts:
            if host in owners:
                raise ConfigError(
                    f"provider.pools.{pool}: {host} is also in {owners[host]}; Ray runs one node "
                    f"on a host (the head may serve too: give its node type resources and labels)"
                )
            owners[host] = f"provider.pools.{pool}"
