"""Cluster files: those that are shipped, and those that `bora cluster init` writes."""

from __future__ import annotations

import fcntl
import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cluster_file import (
    HEAD_SETTINGS,
    HEALTH_SETTINGS,
    OnPremCluster,
    onprem_yaml,
    pools_of,
    start_commands,
)
from cluster.names import GPU_LABEL, POOL_LABEL
from cluster.priority import VARIABLE
from cluster.provider_config import checked_cluster
from placement.catalogue import CONFIGS, load_catalogue
from placement.errors import ConfigError, UnknownName
from tests.system.harness import eventually

CATALOGUE = load_catalogue()
FOLDER = CONFIGS / "clusters"
LAUNCHED = ["aws-mixed", "gcp-mixed", "one-box", "onprem-mixed", "onprem-redis"]
REDIS = {"onprem-redis": "10.0.0.5:6379"}
POOLS = [
    "rtx4090=RTX-4090:4@10.0.0.11,10.0.0.12",
    "a100=A100-80-SXM:8@10.0.0.21",
    "h100=H100-SXM:8@10.0.0.31,10.0.0.32",
]


def shipped(name: str) -> dict[str, Any]:
    cluster: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return cluster


def init(out: Path, *arguments: str, answers: str = "") -> str:
    result = CliRunner().invoke(app, ["cluster", "init", str(out), *arguments], input=answers)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return out.read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_every_file(name: str):
    validate_config(prepare_config(shipped(name)))


@pytest.mark.parametrize("name", ["one-box", "onprem-mixed", "onprem-redis"])
def test_the_provider_accepts_the_files_for_hosts_of_ones_own(name: str):
    assert checked_cluster(shipped(name))["provider"]["drain_s"] == 60


@pytest.mark.parametrize("name", LAUNCHED)
def test_pools_are_labelled_with_types_that_the_catalogue_knows(name: str):
    for pool, node_type in shipped(name)["available_node_types"].items():
        labels, resources = node_type["labels"], node_type["resources"]
        if pool == "head" and not labels:
            continue
        gpu = CATALOGUE.gpu(labels[GPU_LABEL])
        assert labels[POOL_LABEL] in (pool, "local")
        assert labels["ray.io/accelerator-type"] == gpu.ray_accelerator_type
        assert resources[f"accelerator_type:{gpu.ray_accelerator_type}"] == 1
        assert resources["GPU"] in (1, 2, 4, 8)


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_file_ships_code_installs_the_lock_file_and_starts_with_a_token(name: str):
    cluster = shipped(name)
    own = cluster["provider"]["type"] == "external"
    mounts = cluster["file_mounts"]
    for remote, local in mounts.items():
        if remote.startswith("~/bora/"):
            assert (CONFIGS.parent / local).exists(), local
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    for kind in ("head_setup_commands", "worker_setup_commands"):
        assert "sh requirements/node.sh" in cluster[kind][-1]
    settings = HEAD_SETTINGS if own else HEALTH_SETTINGS
    redis = REDIS.get(name, "")
    head, worker = start_commands(cluster["cluster_name"], dict(settings), redis)
    assert cluster["head_start_ray_commands"] == head
    assert cluster["worker_start_ray_commands"] == worker
    assert "RAY_AUTH_MODE=token" in head[0]
    assert "RAY_health_check_timeout_ms=2000" in head[0]
    for command in (head[0], worker[0]):  # else a dying host stops all placements for two minutes
        assert "RAY_grpc_client_keepalive_timeout_ms=5000" in command


@pytest.mark.parametrize("name", [*LAUNCHED, "kuberay"])
def test_every_file_says_what_to_edit(name: str):
    assert "EDIT" in (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", ["onprem-mixed", "onprem-redis"])
def test_the_shipped_file_is_what_init_writes(name: str):
    redis = REDIS.get(name, "")
    wanted = OnPremCluster(name, "10.0.0.10", pools_of(POOLS, CATALOGUE), redis=redis)

    assert (FOLDER / f"{name}.yaml").read_text() == onprem_yaml(wanted, CATALOGUE)


def test_with_redis_hosts_wait_for_a_head_that_is_down_and_the_password_is_in_no_file():
    cluster = shipped("onprem-redis")

    [head], [worker] = cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]
    assert "RAY_REDIS_ADDRESS=10.0.0.5:6379" in head
    assert "RAY_external_storage_namespace=onprem-redis" in head
    assert "--redis-password=$(cat ~/.ray/redis_password)" in head
    assert cluster["file_mounts"]["~/.ray/redis_password"] == "~/.ray/redis_password"
    for command in (head, worker):
        assert "RAY_gcs_rpc_server_reconnect_timeout_s=86400" in command
    assert "RAY_REDIS" not in worker


def test_a_redis_without_a_port_is_refused(tmp_path: Path):
    flags = ["--kind", "onprem", "--name", "lab", "--head", "h", "--redis", "10.0.0.5"]

    with pytest.raises(ConfigError, match=r"--redis 10\.0\.0\.5: HOST:PORT is expected"):
        init(tmp_path / "cluster.yaml", *flags, "--pool", "a=L4@h1")


def test_kuberay_pools_are_labelled_and_authenticated():
    cluster = shipped("kuberay")

    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["rayVersion"] in (CONFIGS.parent / "pyproject.toml").read_text()
    assert "redisAddress" in spec["gcsFaultToleranceOptions"]
    [head] = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": VARIABLE, "value": "0"} in head["env"]
    for group in spec["workerGroupSpecs"]:
        settings = group["template"]["spec"]["containers"][0]["env"]
        told = {setting["name"]: setting["value"] for setting in settings}
        assert int(told["RAY_gcs_rpc_server_reconnect_timeout_s"]) >= 600  # a pod takes minutes
        assert told[VARIABLE] == "0"
        labels = dict(pair.split("=") for pair in group["rayStartParams"]["labels"].split(","))
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert labels[POOL_LABEL] == group["groupName"]
        gpu = CATALOGUE.gpu(labels[GPU_LABEL])
        assert labels["ray.io/accelerator-type"] == gpu.ray_accelerator_type
        assert limits["nvidia.com/gpu"] == int(group["rayStartParams"]["num-gpus"])


def test_init_takes_flags(tmp_path: Path):
    flags = ["--kind", "onprem", "--name", "lab", "--head", "10.1.0.1", "--ssh-user", "me"]
    flags += ["--ssh-key", "~/key", "--pool", "h100=h100-sxm:8@10.1.0.2, 10.1.0.3"]

    cluster = yaml.safe_load(init(tmp_path / "c.yaml", *flags))

    assert cluster["cluster_name"] == "lab"
    assert cluster["max_workers"] == 2
    assert cluster["provider"]["pools"] == {"h100": ["10.1.0.2", "10.1.0.3"]}
    assert cluster["auth"] == {"ssh_user": "me", "ssh_private_key": "~/key"}
    assert Path(cluster["file_mounts"]["~/bora/cluster"]).is_absolute()
    checked_cluster(cluster)


def test_init_asks_for_what_flags_leave_open(tmp_path: Path):
    answers = "onprem\nlab\n10.1.0.1\na=A10:1@h1 b=L4:2@h2\nme\n~/key\n"

    cluster = yaml.safe_load(init(tmp_path / "c.yaml", answers=answers))

    assert cluster["provider"]["pools"] == {"a": ["h1"], "b": ["h2"]}


@pytest.mark.parametrize("kind", ["aws", "gcp", "one-box", "kuberay"])
@pytest.mark.parametrize("name", ["prod", "null", "no", "bora-two"])  # YAML: None, False
def test_init_names_the_cluster_everywhere(tmp_path: Path, kind: str, name: str):
    text = init(tmp_path / "c.yaml", "--kind", kind, "--name", name)

    cluster = yaml.safe_load(text)
    assert name in (cluster.get("cluster_name"), cluster.get("metadata", {}).get("name"))
    if kind != "kuberay":
        validate_config(prepare_config(cluster))
        assert f"--cluster {name} -- ray start --head" in cluster["head_start_ray_commands"][0]
        mounts = cluster["file_mounts"]
        assert mounts["~/bora/cluster"] == str(CONFIGS.parent / "cluster")
    if kind == "one-box":
        checked_cluster(cluster)


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        (["--pool", "h100"], ConfigError, "NAME=GPU:COUNT@HOST,HOST is expected"),
        (["--pool", "h=H100-SXM:x@a"], ConfigError, "NAME=GPU:COUNT@HOST,HOST is expected"),
        (["--pool", "h=H100-SXX@a"], UnknownName, "H100-SXM"),
        (["--pool", "h=L4@a", "--pool", "h=L4@b"], ConfigError, "two pools are called 'h'"),
        (["--name", "Prod"], ConfigError, "a-z, 0-9 and dashes"),
        (["--name", "1e3"], ConfigError, "with a letter first"),
        (["--name", "a" * 41], ConfigError, "up to 40 of"),
        (["--name", ""], ConfigError, "--name : up to 40 of"),
        (["--pool", "head=L4@b"], ConfigError, "'head' is the head's own type"),
        (["--pool", "c=cpu:2@b"], ConfigError, "the resource bora_slot instead of GPU"),
        (["--pool", "a b=L4@b"], ConfigError, "'a b' is no name"),
        (["--pool", "h=L4:0@b"], ConfigError, "NAME=GPU:COUNT@HOST,HOST is expected"),
        (["--pool", "h=L4:\u0663@b"], ConfigError, "NAME=GPU:COUNT@HOST,HOST is expected"),
        (["--pool", "h=L4:1000@b"], ConfigError, "NAME=GPU:COUNT@HOST,HOST is expected"),
        (["--pool", "h=L4@me@b"], ConfigError, "'me@b' is no address"),
        (["--pool", "h=L4@b:22"], ConfigError, "'b:22' is no address"),
        (["--pool", "h=L4@a"], ConfigError, "a is also in provider.head"),
        (["--pool", "h=L4@b,b"], ConfigError, "b is also in provider.pools.h"),
        (["--pool", "h=L4@b", "--head", "fd00::1"], ConfigError, "IPv6"),
        (["--pool", "h=L4@b", "--ssh-user", ""], ConfigError, "auth.ssh_user: '' is no account"),
        (["--pool", "h=L4@b", "--ssh-key", ""], ConfigError, "auth.ssh_private_key is missing"),
        (["--pool", "h=L4@b", "--redis", "r:99999"], ConfigError, "--redis r:99999: HOST:PORT"),
        (["--pool", "h=L4@b", "--redis", "a;b:1"], ConfigError, "--redis: 'a;b' is no address"),
        (["--kind", "aws", "--pool", "h=L4@b"], ConfigError, "--head is for --kind onprem"),
    ],
)
def test_init_refuses_wrong_flags(tmp_path: Path, flags: list[str], error: type, said: str):
    whole = ["--kind", "onprem", "--head", "a", "--ssh-user", "u", "--ssh-key", "k", *flags]
    whole += [] if "--name" in flags else ["--name", "lab"]

    with pytest.raises(error, match=re.escape(said)):
        init(tmp_path / "c.yaml", *whole)

    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.filterwarnings("ignore")
def test_what_init_writes_ray_accepts_too(tmp_path: Path):
    flags = ["--kind", "onprem", "--name", "no", "--head", "h0.example.com", "--ssh-user", "me"]
    flags += ["--ssh-key", "~/my key", "--redis", "10.0.0.5:6379", "--pool", "null=L4:3@h_1"]

    cluster = yaml.safe_load(init(tmp_path / "c.yaml", *flags, "--pool", "1=A10:2@10.0.0.2"))

    validate_config(prepare_config(cluster))
    assert set(checked_cluster(cluster)["provider"]["pools"]) == {"null", "1"}


def test_init_does_not_replace_a_file(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("mine")

    with pytest.raises(ConfigError, match="--force replaces it"):
        init(tmp_path / "c.yaml", "--kind", "aws", "--name", "prod")

    assert (tmp_path / "c.yaml").read_text() == "mine"


def a_node(folder: Path, lock: str = "ray==2.60.0\n") -> Path:
    """A folder as `requirements/node.sh` finds it; returns the stamp of its lock file."""
    (folder / "requirements").mkdir(exist_ok=True)
    (folder / "requirements" / "gpu.txt").write_text(lock)
    (folder / "pyproject.toml").touch()
    (folder / ".venv").mkdir(exist_ok=True)
    return folder / ".venv" / f"installed-gpu-{hashlib.sha256(lock.encode()).hexdigest()[:16]}"


def installing(folder: Path, python: str = "no-python") -> subprocess.Popen[bytes]:
    script = (CONFIGS.parent / "requirements" / "node.sh").read_text()
    env = {"PATH": "/usr/bin:/bin", "PYTHON": python}
    return subprocess.Popen(
        ["sh", "-c", script, "node.sh", "gpu"], cwd=folder, env=env, stderr=subprocess.DEVNULL
    )


def test_a_node_whose_lock_file_is_installed_is_left_alone(tmp_path: Path):
    """`requirements/node.sh` ends before it looks for a Python."""
    stamp = a_node(tmp_path)

    before = installing(tmp_path).wait(60)
    stamp.touch()
    after = installing(tmp_path).wait(60)

    assert before != 0
    assert after == 0


def test_a_lock_file_of_before_is_installed_again(tmp_path: Path):
    """Its stamp must not outlive what was installed over it."""
    a_node(tmp_path).touch()
    a_node(tmp_path, "ray==2.61.0\n")
    assert installing(tmp_path).wait(60) != 0

    a_node(tmp_path)
    assert installing(tmp_path).wait(60) != 0


def test_an_environment_that_was_half_made_is_made_anew(tmp_path: Path):
    """`ray up` may be ended between making it and giving it a pip."""
    a_node(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir()
    (tmp_path / ".venv" / "bin" / "python").symlink_to("/bin/false")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    python.chmod(0o755)

    installing(tmp_path, str(python)).wait(60)

    assert "-m venv --clear .venv" in (tmp_path / "asked").read_text()


def test_of_two_that_install_at_once_the_second_finds_all_done(tmp_path: Path):
    stamp = a_node(tmp_path)
    with (tmp_path / "requirements" / "gpu.txt").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the first one
        second = installing(tmp_path)
        eventually(lambda: _waits_for_a_lock(second.pid) or second.poll() is not None)
        stamp.touch()

    assert second.wait(60) == 0


def _waits_for_a_lock(pid: int) -> bool:
    """Whether it has come to `flock`."""
    children = psutil.Process(pid).children()
    return any(child.name() == "flock" for child in children)
