"""What `bora doctor` says of hosts, and asks over ssh."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.diagnosis import ROWS, Check, Diagnosis, diagnose
from cluster.host_state import HostState, host_state
from cluster.processes import free_ports
from cluster.ssh_survey import ask_hosts, read_cluster
from placement.errors import ConfigError
from placement.mismatch import Mismatch
from placement.node_facts import DiskFacts, NodeFacts
from tests.placement.nodes import GIB, a_node, pairs
from tests.placement.test_mismatches import PLANTED

ROOT = Path(__file__).resolve().parents[2]


def a_state(**changes: Any) -> HostState:
    fields: dict[str, Any] = {
        "open_files": 65536, "shared_memory_bytes": 16 * GIB, "clock_synchronized": True,
        "hub": "the hub",
    }  # fmt: skip
    return HostState(**{**fields, **changes})


def checks(facts: NodeFacts, state: HostState | None = None, *lies: Mismatch) -> dict[str, Check]:
    diagnosis = diagnose([(facts, state or a_state())], lies)
    return {check.check: check for check in diagnosis.checks}


def test_every_lie_that_is_planted_has_its_row():
    planted = {rule for rule, *_ in PLANTED}

    assert len(planted) >= 12
    assert planted <= set(ROWS)


def test_a_sound_host_passes_every_check():
    diagnosis = diagnose([(a_node(), a_state())], ())

    assert {check.status for check in diagnosis.checks} == {"ok", "skipped"}
    assert diagnosis.healthy
    assert len(diagnosis.checks) >= 10


@pytest.mark.parametrize(
    ("facts", "state", "check", "status", "said"),
    [
        (a_node(problems=("`nvidia-smi -L` hangs",)), a_state(), "driver", "failed", "hangs"),
        (a_node(pairs=pairs(2, copy_correct=False)), a_state(), "P2P", "failed", "0-1"),
        (a_node(versions={"ray": "2"}), a_state(), "versions", "failed", "no bora, torch, vllm"),
        (
            a_node(disk=DiskFacts(path="/c", total_bytes=GIB, free_bytes=GIB)), a_state(),
            "disk", "failed", "1.0 GiB free in /c",
        ),
        (
            a_node(disk=DiskFacts(
                path="/c", total_bytes=900 * GIB, free_bytes=900 * GIB, read_bytes_per_s=5e7
            )),
            a_state(), "disk", "warning", "50 MB/s",
        ),
        (a_node(), a_state(hub_problem="refused"), "models", "warning", "refused"),
        (a_node(), a_state(cache_writable=False), "models", "failed", "read-only"),
        (a_node(), a_state(clock_synchronized=False), "clock", "warning", "not synchronized"),
        (a_node(), a_state(shared_memory_bytes=64 * 2**20), "shared memory", "warning", "0.1 GiB"),
        (a_node(), a_state(open_files=1024), "open files", "warning", "1024"),
        (a_node(), a_state(niceness=15), "priority", "warning", "nice 15"),
        (a_node(), a_state(ports_in_use=(8000,)), "ports", "failed", "8000"),
        (
            a_node(measured={"device": "cuda", "ranks": 0, "took_s": 0, "problem": "it hangs"}),
            a_state(), "speeds", "warning", "it hangs",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_a_cure(
    facts: NodeFacts, state: HostState, check: str, status: str, said: str
):
    found = checks(facts, state)[check]

    assert found.status == status
    assert said in found.found
    assert found.cure


def test_a_mismatch_takes_the_place_of_the_row_that_looked_fine():
    lie = Mismatch(rule="gpu-count", host="h1", declared="8", found="7", cure="look")

    found = checks(a_node(), None, lie)["GPUs"]

    assert found.status == "failed"
    assert found.found == "gpu-count: declared 8; found 7"


def test_warnings_alone_leave_a_cluster_healthy():
    lie = Mismatch(
        rule="ecc-off", host="h1", declared="on", found="off", cure="on", severity="warning"
    )

    assert diagnose([(a_node(), a_state())], [lie]).healthy


def test_ray_nodes_that_share_a_host_say_the_same_thing_once():
    twice = [(a_node(node="h1-a"), a_state()), (a_node(node="h1-b"), a_state())]

    assert diagnose(twice, ()) == diagnose(twice[:1], ())


def test_a_port_that_somebody_listens_on_is_found():
    import socket  # noqa: PLC0415 - by this test only

    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        [free] = free_ports(1)

        assert host_state([taken, free]).ports_in_use == (taken,)


CLUSTER = """
cluster_name: lab
provider:
  type: external
  module: cluster.provider.OnPremProvider
  head: h0
  pools: {{sim: [h1, h2]}}
  folder: {folder}
  python: {python}
auth: {{ssh_user: me, ssh_private_key: ~/.ssh/key}}
available_node_types:
  head: {{resources: {{CPU: 4}}, labels: {{}}}}
  sim: {{resources: {{GPU: 8}}, labels: {{bora.pool: sim, bora.gpu: H100-SXM, zone: a}}}}
head_node_type: head
head_start_ray_commands: [python -m cluster.ray_node start --cluster lab -- ray start --head]
worker_start_ray_commands: [python -m cluster.ray_node start --cluster lab -- ray start]
"""


def a_cluster_file(folder: Path) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(CLUSTER.format(folder=ROOT, python=sys.executable))
    return path


def an_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `ssh` on the PATH that runs the command here; h2 refuses, and h0 has no bora."""
    folder.mkdir()
    script = folder / "ssh"
    script.write_text(
        "#!/bin/sh\n"
        'for last; do host="$before"; before="$last"; done\n'
        'case "$host" in\n'
        '  me@h2) echo "me@h2: Permission denied (publickey)." >&2; exit 255;;\n'
        '  me@h0) echo "sh: no such file" >&2; exit 127;;\n'
        "  me@cut) printf '{\"facts\": \\377';;\n"
        "  me@old) echo '{\"facts\": {}}';;\n"
        "  me@mute) exit 3;;\n"
        '  *) exec sh -c "$last";;\n'
        "esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_hosts_of_a_cluster_file_are_asked_over_ssh(tmp_path, monkeypatch):
    an_ssh(tmp_path / "bin", monkeypatch)
    said: list[str] = []

    reports, others = ask_hosts(read_cluster(a_cluster_file(tmp_path)), said.append, quick=True)

    by_host = {check.host: check for check in others}
    assert (by_host["h1"].check, by_host["h1"].status) == ("ssh", "ok")
    assert (by_host["h2"].check, by_host["h2"].status) == ("ssh", "failed")
    assert "Permission denied" in by_host["h2"].found
    assert "ssh -i ~/.ssh/key -p 22 me@h2" in by_host["h2"].cure
    assert (by_host["h0"].check, by_host["h0"].status) == ("bora", "failed")
    assert "ray up" in by_host["h0"].cure
    [report] = reports
    assert (report.facts.host, report.facts.pool) == ("h1", "sim")
    assert abs(report.facts.clock_offset_s or 9) < 2
    assert len(said) == 3


def test_a_cluster_file_says_what_its_hosts_should_be(tmp_path):
    inventory = read_cluster(a_cluster_file(tmp_path)).inventory

    assert inventory is not None
    [pool] = inventory.pools
    assert (pool.gpu, pool.gpus_per_node, pool.node_names) == ("H100-SXM", 8, ("h1", "h2"))
    assert pool.labels == {"zone": "a"}


def test_what_hosts_say_that_is_no_report_is_told_with_a_cure(tmp_path, monkeypatch):
    an_ssh(tmp_path / "bin", monkeypatch)
    path = a_cluster_file(tmp_path)
    path.write_text(path.read_text().replace("[h1, h2]", "[cut, old, mute]"))

    reports, others = ask_hosts(read_cluster(path), lambda _: None, quick=True)

    by_host = {check.host: check for check in others}
    assert reports == []
    assert "cut off after 11 characters" in by_host["cut"].found
    assert "another version" in by_host["old"].found
    assert "`ray down` and `ray up`" in by_host["old"].cure
    assert "status 3, without a word" in by_host["mute"].found
    assert {check.status for check in others} == {"failed"}


def test_a_head_that_serves_is_compared_with_what_its_type_promises():
    cluster = read_cluster(ROOT / "configs" / "clusters" / "one-box.yaml")

    assert cluster.hosts == {"10.0.0.10": "local"}
    assert cluster.inventory is not None
    [pool] = cluster.inventory.pools
    assert (pool.name, pool.gpu, pool.gpus_per_node) == ("local", "RTX-4090", 4)
    assert pool.node_names == ("10.0.0.10",)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[h1, h2]", "[h1, h1]", "provider.pools.sim: h1 is also in provider.pools.sim"),
        ("GPU: 8", "GPU: many", "available_node_types.sim: resources {'GPU': 'many'}"),
        ("GPU: 8", "GPU: 99999", "available_node_types.sim: .*less than or equal to 1024"),
        ("head: h0", "head: h0\n  head: h9", "head"),
        ("me,", "me, ssh_user: you,", "ssh_user"),
    ],
)
def test_a_file_that_ray_up_would_refuse_is_refused_with_the_key(tmp_path, old, new, said):
    path = a_cluster_file(tmp_path)
    path.write_text(path.read_text().replace(old, new))

    with pytest.raises(ConfigError, match=f"^{path}:.*{said}"):
        read_cluster(path)


async def test_a_hub_that_speaks_no_http_is_a_finding(monkeypatch):
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

        state = await asyncio.to_thread(host_state)

    assert "SSH-2.0-OpenSSH" in state.hub_problem


@pytest.mark.parametrize(
    "text",
    ["provider: {type: aws}\nauth: {ssh_user: ubuntu}", "[]", "provider: [", "", "a: &a [*a]"],
)
def test_a_file_without_hosts_is_refused_by_name(tmp_path, text: str):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=str(path)):
        read_cluster(path)


def test_a_diagnosis_survives_its_json():
    diagnosis = diagnose([(a_node(), a_state())], ())

    assert Diagnosis.model_validate_json(diagnosis.model_dump_json()) == diagnosis
