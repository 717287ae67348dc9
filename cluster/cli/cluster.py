"""`bora cluster init`: a cluster file for `ray up`, asked for or from flags."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml

from cluster.cli.render import page_console
from cluster.cluster_file import OnPremCluster, onprem_yaml, pools_of, renamed
from cluster.provider_config import checked_cluster, require_address
from placement.catalogue import CONFIGS, load_catalogue
from placement.errors import ConfigError

cluster_app = typer.Typer(help="Ray clusters for `ray up`.", no_args_is_help=True)


class Kind(StrEnum):
    """Where the hosts come from."""

    ONPREM = "onprem"
    ONE_BOX = "one-box"
    AWS = "aws"
    GCP = "gcp"
    KUBERAY = "kuberay"


_FILES = {
    Kind.ONE_BOX: "one-box.yaml",
    Kind.AWS: "aws-mixed.yaml",
    Kind.GCP: "gcp-mixed.yaml",
    Kind.KUBERAY: "kuberay.yaml",
}
_NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"


def register(app: typer.Typer) -> None:
    """Add this group of commands."""
    app.add_typer(cluster_app, name="cluster")


@cluster_app.callback()
def group() -> None:
    """A group, though it has one command."""


@cluster_app.command()
def init(
    out: Annotated[Path, typer.Argument(help="The file to write.")] = Path("cluster.yaml"),
    *,
    kind: Annotated[Kind | None, typer.Option(help="Where the hosts come from.")] = None,
    name: Annotated[str | None, typer.Option(help="The cluster's: a-z, 0-9 and dashes.")] = None,
    head: Annotated[str | None, typer.Option(help="onprem: the head's address.")] = None,
    pool: Annotated[
        list[str] | None, typer.Option(help="onprem, again for each: NAME=GPU:COUNT@HOST,HOST")
    ] = None,
    ssh_user: Annotated[str | None, typer.Option(help="onprem: who logs in.")] = None,
    ssh_key: Annotated[str | None, typer.Option(help="onprem: path of the private key.")] = None,
    redis: Annotated[
        str, typer.Option(help="onprem: HOST:PORT of a Redis where the head's state outlives it.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a cluster file for `ray up`; what flags leave open is asked."""
    if os.path.lexists(out) and not force:
        raise ConfigError(f"{out} is there already; --force replaces it")
    kind = kind or typer.prompt("hosts from", default=Kind.ONPREM, type=Kind)
    if name is None:
        name = str(typer.prompt("name of the cluster", default=f"bora-{kind.value}"))
    _require_name(name)
    if kind is Kind.ONPREM:
        text = _onprem(name, head, pool or [], (ssh_user, ssh_key), redis)
    else:
        own = {"head": head, "pool": pool, "ssh-user": ssh_user, "ssh-key": ssh_key, "redis": redis}
        if flag := next((flag for flag, given in own.items() if given), None):
            raise ConfigError(
                f"--{flag} is for --kind onprem; of {kind.value} edit the lines marked EDIT"
            )
        text = _shipped(kind, name)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from error
    start = f"kubectl apply -f {out}" if kind is Kind.KUBERAY else f"ray up -y {out}"
    page_console(stderr=True).print(
        f"wrote {out}; look at the lines marked EDIT, then: {start}", markup=False
    )


def _onprem(
    name: str,
    head: str | None,
    pools: list[str],
    ssh: tuple[str | None, str | None],
    redis: str,
) -> str:
    catalogue = load_catalogue()
    if redis:
        _require_redis(redis)
    head = str(typer.prompt("address of the head")) if head is None else head
    require_address("--head", head)
    if not pools:
        pools = typer.prompt("pools, as h100=H100-SXM:8@10.0.0.21,10.0.0.22; more after a space")
        pools = str(pools).split()
    cluster = OnPremCluster(
        name=name,
        head=head,
        pools=pools_of(pools, catalogue),
        ssh_user=typer.prompt("ssh user", default="ubuntu") if ssh[0] is None else ssh[0],
        ssh_key=typer.prompt("ssh key", default="~/.ssh/id_ed25519") if ssh[1] is None else ssh[1],
        code=str(CONFIGS.parent),
        redis=redis,
    )
    text = onprem_yaml(cluster, catalogue)
    checked_cluster(yaml.safe_load(text))  # that is: hosts that are there twice, the ssh user
    return text


def _shipped(kind: Kind, name: str) -> str:
    """A file of `configs/clusters/` under another name, with the code where it is here."""
    text = (CONFIGS / "clusters" / _FILES[kind]).read_text(encoding="utf-8")
    return renamed(text, f"bora-{kind.value}", name)


def _require_name(name: str) -> None:
    """Clouds and Kubernetes make names of instances and pods from it, of 63 letters at most."""
    if re.fullmatch(_NAME, name) is None:
        raise ConfigError(
            f"--name {name}: up to 40 of a-z, 0-9 and dashes are expected, with a letter first, as "
            f"in bora-onprem"
        )


def _require_redis(redis: str) -> None:
    host, _, port = redis.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ConfigError(f"--redis {redis}: HOST:PORT is expected, as in 10.0.0.5:6379")
    require_address("--redis", host)
