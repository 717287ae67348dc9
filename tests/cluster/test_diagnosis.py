"""What `bora doctor` says of hosts, and asks over ssh."""

from __future__ import annotations

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
provider: {{type: external, head: h0, pools: {{sim: [h1, h2]}}, folder: {folder}, python: {python}}}
auth: {{ssh_user: me, ssh_private_key: ~/.ssh/key}}
available_node_types:
  head: {{resources: {{CPU: 4}}, labels: {{}}}}
  sim: {{resources: {{GPU: 8}}, labels: {{bora.pool: sim, bora.gpu: H100-SXM, zone: a}}}}
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


@pytest.mark.parametrize(
    "text", ["provider: {type: aws}\nauth: {ssh_user: ubuntu}", "[]", "provider: ["]
)
def test_a_file_without_hosts_is_refused_by_name(tmp_path, text: str):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=str(path)):
        read_cluster(path)


def test_a_diagnosis_survives_its_json():
    diagnosis = diagnose([(a_node(), a_state())], ())

    assert Diagnosis.model_validate_json(diagnosis.model_dump_json()) == diagnosis
