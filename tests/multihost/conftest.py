"""One lab, one cluster for all tests of this folder: starting it takes most of the time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cluster_file import HEAD_SETTINGS, OnPremCluster, onprem_yaml, pools_of
from placement.catalogue import load_catalogue
from tests.debian_packages import install_missing
from tests.multihost.lab import OPERATOR, Host, Lab, running_lab

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = "~/bora/.venv/bin/python"
_CPU_HOSTS = {
    "node_config": {},
    "resources": {"CPU": 2, "bora_slot": 1},
    "labels": {
        "bora.pool": "cpu",
        "bora.gpu": "cpu",
        "bora.memory-gib": "6",
        "bora.kv-cache-gib": "1",
    },
    "min_workers": 1,
    "max_workers": 1,
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """A lab with a cluster file on the operator's host; nothing of Ray runs yet."""

    lab: Lab

    def ray(self, command: str, timeout_s: float = 150.0) -> str:
        """A command of Ray's cluster launcher."""
        return self.lab.run(OPERATOR, f"ray {command} -y lab.yaml 2>&1", timeout_s=timeout_s)

    def bora(self, arguments: str, timeout_s: float = 120.0) -> str:
        """A command of bora's, on the head."""
        shell = f"cd bora && {PYTHON} -m cluster {arguments}"
        return self.lab.run("head", shell, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Pools of 4090, A100 and H100, of whose two hosts one is down, and one without GPUs."""
    if os.geteuid() != 0:
        pytest.fail("hosts with their own networks need root: sudo make test-multihost")
    install_missing()
    with running_lab("head", "r1", "a1", "h1", "h2", "c1", shown=[ROOT]) as lab:
        furnish(lab, _cluster_file(lab))
        lab.power_off("h1")
        yield Cluster(lab)


def _cluster_file(lab: Lab) -> dict[str, Any]:
    """As `bora cluster init` writes it, for hosts that share this machine's two or so cores."""
    catalogue = load_catalogue()
    pools = pools_of(
        [
            f"rtx4090=RTX-4090:4@{lab.address('r1')}",
            f"a100=A100-80-SXM:8@{lab.address('a1')}",
            f"h100=H100-SXM:8@{lab.address('h1')},{lab.address('h2')}",
        ],
        catalogue,
    )
    wanted = OnPremCluster(
        name="lab",
        head=lab.address("head"),
        pools=pools,
        ssh_user="root",
        ssh_key="~/.ssh/lab_key",
        code=str(ROOT),
        settings={**HEAD_SETTINGS, "RAY_health_check_timeout_ms": 5000},
    )
    cluster: dict[str, Any] = yaml.safe_load(onprem_yaml(wanted, catalogue))
    cluster["available_node_types"]["h100"]["min_workers"] = 1
    cluster["available_node_types"]["cpu"] = _CPU_HOSTS
    cluster["provider"]["pools"]["cpu"] = [lab.address("c1")]
    cluster["max_workers"] += 1
    cluster["provider"]["drain_s"] = 20
    return cluster


def furnish(lab: Lab, cluster_file: Mapping[str, Any]) -> Path:
    """bora on every host, and on the operator's token and `lab.yaml`; the operator's home folder."""
    for host in lab.hosts.values():
        install_bora(host)
    home = lab.hosts[OPERATOR].folder / "root"
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    (home / "lab.yaml").write_text(yaml.safe_dump(cluster_file))
    return home


def without_dashboard(cluster_file: dict[str, Any]) -> None:
    """It is a dozen processes on the head."""
    [start] = cluster_file["head_start_ray_commands"]
    start = start.replace("--dashboard-host=127.0.0.1", "--include-dashboard=false")
    cluster_file["head_start_ray_commands"] = [start]


def live_nodes(lab: Lab, field: str) -> list[str]:
    """That field of Ray's live nodes, sorted; none where no head answers."""
    script = (
        "import ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR'); "
        f"print('NODES', *[n['{field}'] for n in ray.nodes() if n['Alive']])"
    )
    with contextlib.suppress(AssertionError):
        said = lab.run("head", f'RAY_AUTH_MODE=token {PYTHON} -c "{script}"')
        line = next(line for line in said.splitlines() if line.startswith("NODES"))
        return sorted(line.split()[1:])
    return []


def install_bora(host: Host) -> None:
    """An environment as `requirements/node.sh` leaves it: this one, and the code by file_mounts."""
    home, here = host.folder / "root", Path(sys.prefix)
    venv = home / "bora" / ".venv"
    venv.mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        if (here / name).exists():
            (venv / name).symlink_to(here / name)
    shutil.copy(here / "pyvenv.cfg", venv)
    for kind in ("cpu", "gpu"):
        lock = (ROOT / "requirements" / f"{kind}.txt").read_bytes()
        text = lock + (ROOT / "pyproject.toml").read_bytes()
        (venv / f"installed-{kind}-{hashlib.sha256(text).hexdigest()[:16]}").touch()
    code = ROOT if host.name == OPERATOR else Path("/root/bora")
    (home / ".profile").write_text(
        "export PATH=/root/bora/.venv/bin:$PATH "
        f"PYTHONPATH={code} PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0\n"
    )
    (home / ".bashrc").touch()
