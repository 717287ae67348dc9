"""`bora cluster init`: a cluster file for `ray up`, asked for or from flags."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.render import page_console
from cluster.cluster_file import OnPremCluster, onprem_yaml, pools_of
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
_NAME = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"


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
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already; --force replaces it")
    kind = kind or typer.prompt("hosts from", default=Kind.ONPREM, type=Kind)
    name = name or typer.prompt("name of the cluster", default=f"bora-{kind.value}")
    _require_name(name)
    if kind is Kind.ONPREM:
        text = _onprem(name, head, pool or [], (ssh_user, ssh_key), redis)
    else:
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
    if redis and re.fullmatch(r"[^\s:]+:\d+", redis) is None:
        raise ConfigError(f"--redis {redis}: HOST:PORT is expected, as in 10.0.0.5:6379")
    head = head or typer.prompt("address of the head")
    if not pools:
        pools = typer.prompt("pools, as h100=H100-SXM:8@10.0.0.21,10.0.0.22; more after a space")
        pools = str(pools).split()
    cluster = OnPremCluster(
        name=name,
        head=head,
        pools=pools_of(pools, catalogue),
        ssh_user=ssh[0] or typer.prompt("ssh user", default="ubuntu"),
        ssh_key=ssh[1] or typer.prompt("ssh key", default="~/.ssh/id_ed25519"),
        code=str(CONFIGS.parent),
        redis=redis,
    )
    return onprem_yaml(cluster, catalogue)


def _shipped(kind: Kind, name: str) -> str:
    """A file of `configs/clusters/` under another name, with the code where it is here."""
    text = (CONFIGS / "clusters" / _FILES[kind]).read_text(encoding="utf-8")
    named = re.sub(rf"\bbora-{kind.value}\b(?!:)", name, text)
    return re.sub(
        r"^(  ~/bora/\S+: )(\S+)$", rf"\g<1>{CONFIGS.parent}/\2", named, flags=re.MULTILINE
    )


def _require_name(name: str) -> None:
    if re.fullmatch(_NAME, name) is None:
        raise ConfigError(f"--name {name}: a-z, 0-9 and dashes are expected, as in bora-onprem")
