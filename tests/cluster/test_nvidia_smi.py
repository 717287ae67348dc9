"""What `nvidia-smi` prints becomes facts, on hosts of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterError
from cluster.local_inventory import local_inventory
from cluster.probes.node import probe
from cluster.probes.nvidia_smi import ask_driver
from cluster.probes.nvidia_topology import parse_pairs
from cluster.probes.nvidia_xml import UnreadableDriverOutput, parse_capabilities, parse_log
from cluster.raylets import raylets
from placement.catalogue import load_catalogue
from tests.cluster.nvidia_samples import (
    MIG_LISTING,
    full,
    gpu,
    h100,
    peers,
    rtx_4090,
    smi_log,
    topology,
)

MIB = 2**20
CATALOGUE = load_catalogue()


def test_an_h100_box_is_read_as_its_driver_prints_it():
    driver, gpus, problems = parse_log(
        smi_log(*(h100(index) for index in range(8))),
        capabilities=parse_capabilities("GPU-00000003-aaaa, 9.0\n"),
    )

    assert (driver, problems) == ("580.95.05", ())
    assert [each.index for each in gpus] == list(range(8))
    assert gpus[3].name == "NVIDIA H100 80GB HBM3"
    assert gpus[3].memory_bytes == 81559 * MIB  # of the frame buffer, not of BAR1
    assert gpus[3].compute_capability == "9.0"
    assert (gpus[3].pcie_max_generation, gpus[3].pcie_generation) == (5, 1)
    assert (gpus[3].pcie_width, gpus[3].pcie_max_width) == (16, 16)
    assert (gpus[3].ecc, gpus[3].uncorrected_errors, gpus[3].remapping) == (True, 0, "")
    assert not gpus[3].mig


def test_what_a_card_does_not_have_is_unknown_and_no_error():
    _, [card], _ = parse_log(smi_log(rtx_4090(0)))

    assert card.ecc is None
    assert card.uncorrected_errors == 0
    assert card.pcie_width == 8


def test_errors_since_the_driver_was_loaded_count_older_ones_do_not():
    sick = gpu(0, "NVIDIA A100-SXM4-40GB", mib=40960, errors="2", pending="Yes")

    _, [card], _ = parse_log(smi_log(sick))

    assert (card.uncorrected_errors, card.remapping) == (2, "pending")


def test_slices_get_profile_and_uuid_from_the_listing():
    cut = gpu(0, "NVIDIA H100 80GB HBM3", mib=81559, slices=(40448, 9728))

    _, [card, whole], _ = parse_log(smi_log(cut, h100(1)), listing=MIG_LISTING)

    assert card.mig
    assert [(each.profile, each.uuid) for each in card.mig_slices] == [
        ("3g.40gb", "MIG-11111111-aaaa"),
        ("1g.10gb+me", "MIG-22222222-aaaa"),
    ]
    assert card.mig_slices[0].memory_bytes == 40448 * MIB
    assert whole.mig_slices == ()


LOST = ("ERR!", "Unknown Error", "GPU is lost", "[N/A]", "")


@pytest.mark.parametrize("said", LOST)
def test_a_gpu_that_fell_off_the_bus_is_a_problem_and_the_others_keep_their_index(said: str):
    lost = h100(1).replace("NVIDIA H100 80GB HBM3", said).replace("81559 MiB", said)

    _, gpus, [problem] = parse_log(smi_log(h100(0), lost, h100(2)))

    assert [each.index for each in gpus] == [0, 2]
    assert problem.startswith("GPU 1 (00000000:19:00.0) cannot be used: nvidia-smi prints")
    assert f"product_name {said!r}, fb_memory_usage/total {said!r}" in problem
    assert "Xid" in problem


@pytest.mark.parametrize("memory", ["N/A", "80 GiB", "-1 MiB", "0 MiB", "81559"])
def test_memory_that_is_not_told_in_mebibytes_is_not_guessed(memory: str):
    _, gpus, [problem] = parse_log(smi_log(h100(0).replace("81559 MiB", memory)))

    assert gpus == ()
    assert f"fb_memory_usage/total {memory!r}" in problem


def test_warnings_around_the_log_are_told_and_hide_no_gpu():
    noisy = f"Unable to determine the device handle for GPU 0000:1B:00.0\n{smi_log(h100(0))}"
    noisy += "WARNING: infoROM is corrupted at gpu 0000:18:00.0\n"

    _, [_], problems = parse_log(noisy)

    assert [problem.split()[1] for problem in problems] == ["Unable", "WARNING:"]


def test_gpus_that_the_driver_counts_but_does_not_describe_are_told():
    text = smi_log(h100(0)).replace("<attached_gpus>1<", "<attached_gpus>2<")

    _, [_], problems = parse_log(text)

    assert problems == ("2 GPUs are attached, the driver describes 1 of them",)


def test_what_the_driver_asks_for_is_told():
    action = "<gpu_recovery_action>Drain and Reset</gpu_recovery_action></gpu>"

    _, [_], [problem] = parse_log(smi_log(h100(0).replace("</gpu>", action)))

    assert (
        problem == "GPU 0 (00000000:18:00.0): the driver asks for 'Drain and Reset' to recover it"
    )


@pytest.mark.parametrize(
    ("field", "state"),
    [
        ("<retired_pages><pending_retirement>Yes</pending_retirement></retired_pages>", "pending"),
        (
            (
                "<ecc_errors><aggregate><sram_threshold_exceeded>Yes</sram_threshold_exceeded>"
                "</aggregate></ecc_errors>"
            ),
            "failed",
        ),
    ],
)
def test_memory_that_wears_out_is_told_on_every_generation(field: str, state: str):
    card = rtx_4090(0).replace("<uuid>", f"{field}<uuid>")

    _, [card_facts], _ = parse_log(smi_log(card))

    assert card_facts.remapping == state


def test_a_slice_without_memory_or_uuid_is_told_and_not_counted():
    cut = gpu(0, "NVIDIA H100 80GB HBM3", mib=81559, slices=(40448, 9728))

    _, [unlisted], problems = parse_log(smi_log(cut))
    _, [card], [problem] = parse_log(smi_log(cut.replace("9728 MiB", "N/A")), listing=MIG_LISTING)

    assert unlisted.mig_slices == ()
    assert problems[0] == "GPU 0: the driver tells no UUID of its MIG slice 0"
    assert [each.profile for each in card.mig_slices] == ["3g.40gb"]
    assert problem == "GPU 0: the driver tells no memory of its MIG slice 1"


@pytest.mark.parametrize("text", ["", "Failed to initialize NVML: Driver/library version mismatch"])
def test_what_is_no_log_is_refused_with_what_was_printed(text: str):
    with pytest.raises(UnreadableDriverOutput, match=f"nvidia-smi -q -x: .*{text[:20]}"):
        parse_log(text)


def test_links_and_peer_access_come_from_the_matrices():
    found = parse_pairs(topology(full(8, "NV18"), nic=True), peers(full(8, "OK")))

    assert len(found) == 28
    assert {(pair.path, pair.peer) for pair in found} == {("NV18", "OK")}


def test_a_pair_is_barred_if_one_direction_is():
    matrix = full(2, "OK")
    matrix[1][0] = "CNS"

    [pair] = parse_pairs(topology(full(2, "PHB")), peers(matrix))

    assert (pair.path, pair.peer) == ("PHB", "CNS")


def test_without_matrices_there_are_no_pairs():
    assert parse_pairs("", "") == ()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **answers: str) -> None:
    """An `nvidia-smi` on the PATH that prints these; the others print nothing."""
    folder.mkdir()
    for name, text in answers.items():
        (folder / name).write_text(text)
    script = folder / "nvidia-smi"
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "flags = ' '.join(sys.argv[1:])\n"
        "names = {'-L': 'listing', '-q -x': 'log', 'topo -m': 'topology', 'topo -p2p r': 'peers'}\n"
        "file = pathlib.Path(__file__).parent / names.get(flags, 'other')\n"
        "broken = pathlib.Path(__file__).parent / 'broken'\n"
        "refuses = pathlib.Path(__file__).parent / 'refuses'\n"
        "if refuses.exists() and flags.startswith(refuses.read_text()):\n"
        "    sys.exit('not here')\n"
        "print(broken.read_text() if broken.exists() else file.read_text() if file.exists() else '')\n"
        "sys.exit(9 if broken.exists() else 0)\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_host_is_asked_for_all_of_it(tmp_path, monkeypatch):
    install(
        tmp_path / "bin", monkeypatch,
        log=smi_log(rtx_4090(0), rtx_4090(1)),
        topology=topology(full(2, "PHB")),
        peers=peers(full(2, "CNS")),
    )  # fmt: skip

    [pool] = local_inventory(CATALOGUE).pools

    assert (pool.gpu, pool.gpus_per_node, pool.links.intra) == ("RTX-4090", 2, "pcie-no-p2p")


@pytest.mark.parametrize("refused", ["topo", "-L", "--query-gpu"])
def test_a_question_that_is_not_answered_takes_no_gpu_away(tmp_path, monkeypatch, refused: str):
    install(tmp_path / "bin", monkeypatch, log=smi_log(rtx_4090(0), rtx_4090(1)), refuses=refused)

    driver = ask_driver()

    assert len(driver.gpus) == 2
    assert driver.problems[0].startswith(f"`nvidia-smi {refused}")
    assert driver.problems[0].endswith("ended with 1: not here")


def test_a_lost_gpu_leaves_those_that_still_answer(tmp_path, monkeypatch):
    lost = h100(1).replace("81559 MiB", "GPU is lost")
    install(tmp_path / "bin", monkeypatch, broken=smi_log(h100(0), lost, h100(2)))

    facts = probe(measure=False)
    [only] = raylets(facts, CATALOGUE, "h100")

    assert [gpu.index for gpu in facts.gpus] == [0, 2]
    assert "GPU 1 (00000000:19:00.0) cannot be used" in facts.problems[0]
    # By number Ray would hand out the lost one.
    assert "CUDA_VISIBLE_DEVICES=GPU-00000000-aaaa,GPU-00000002-aaaa" in only.start_arguments()


def test_a_driver_without_its_tool_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    loaded = tmp_path / "version"
    assert ask_driver(loaded).problems == ()

    loaded.write_text("NVRM version: 580.95.05")

    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in ask_driver(loaded).problems[0]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("2,0", [0, 2]), ("GPU-00000001", [1]), ("", []), ("-1", []), ("NoDevFiles", [])],
)
def test_what_cuda_may_not_see_is_not_offered(tmp_path, monkeypatch, visible: str, indices: Any):
    install(tmp_path / "bin", monkeypatch, log=smi_log(h100(0), h100(1), h100(2)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert [gpu.index for gpu in probe(measure=False).gpus] == indices


def test_a_mixed_box_with_a_cut_card_gets_a_ray_node_for_each_kind(tmp_path, monkeypatch):
    cut = gpu(0, "NVIDIA H100 80GB HBM3", mib=81559, slices=(40448, 9728))
    install(
        tmp_path / "bin", monkeypatch,
        log=smi_log(cut, h100(1), rtx_4090(2), rtx_4090(3)),
        listing=MIG_LISTING,
        topology=topology(full(4, "SYS")),
        peers=peers(full(4, "CNS")),
    )  # fmt: skip

    commands = [each.start_arguments() for each in raylets(probe(measure=False), CATALOGUE, "box")]

    assert len(commands) == 4
    assert "CUDA_VISIBLE_DEVICES=MIG-11111111-aaaa" in commands[0]
    assert "--num-gpus 1" in commands[0]
    assert "bora.pool=box-h100-sxm-mig-3g.40gb,bora.gpu=H100-SXM-MIG-3g.40gb" in commands[0]
    assert "CUDA_VISIBLE_DEVICES=GPU-00000002-aaaa,GPU-00000003-aaaa" in commands[3]
    assert "--num-gpus 2" in commands[3]
    assert "bora.gpu=RTX-4090" in commands[3]
    assert "bora.memory-gib=39.5" in commands[0]


def test_a_ray_node_of_such_a_box_sees_its_own_part(tmp_path, monkeypatch):
    install(
        tmp_path / "bin", monkeypatch,
        log=smi_log(h100(0), rtx_4090(1), rtx_4090(2)),
        topology=topology(full(3, "SYS")),
        peers=peers(full(3, "CNS")),
    )  # fmt: skip
    monkeypatch.setenv("BORA_GPUS", "GPU-00000001-aaaa,GPU-00000002-aaaa")

    facts = probe(measure=False)

    assert [each.name for each in facts.gpus] == ["NVIDIA GeForce RTX 4090"] * 2
    assert [(pair.first, pair.second) for pair in facts.pairs] == [(1, 2)]


def test_a_box_of_one_kind_needs_nothing_special(tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, log=smi_log(h100(0)))

    [only] = raylets(probe(measure=False), CATALOGUE, "h100")

    assert only.start_arguments() == (
        "RAY_worker_niceness=0 ray start --num-gpus 1 --labels bora.pool=h100,bora.gpu=H100-SXM"
    )


def test_a_driver_that_fails_is_a_problem_and_not_a_host_without_gpus(tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, broken="Failed to initialize NVML: Unknown Error")

    assert "ended with 9: Failed to initialize NVML" in ask_driver().problems[0]
    with pytest.raises(ClusterError, match="Failed to initialize NVML"):
        local_inventory(CATALOGUE)


def test_a_card_that_the_catalogue_lacks_is_named(tmp_path, monkeypatch):
    install(tmp_path / "bin", monkeypatch, log=smi_log(gpu(0, "NVIDIA Z9 Ultra", mib=100000)))

    with pytest.raises(ClusterError, match="NVIDIA Z9 Ultra"):
        local_inventory(CATALOGUE)


def test_up_on_a_mixed_box_says_how_to_start_ray_there(tmp_path, monkeypatch):
    install(
        tmp_path / "bin", monkeypatch,
        log=smi_log(h100(0), rtx_4090(1)),
        topology=topology(full(2, "SYS")),
        peers=peers(full(2, "CNS")),
    )  # fmt: skip

    result = subprocess.run(
        [sys.executable, "-m", "cluster", "up"],
        env={**os.environ, "BORA_STATE": str(tmp_path / "state"), "COLUMNS": "500"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert result.returncode == 3
    assert "1 x H100-SXM, 1 x RTX-4090" in result.stderr
    assert "RAY_worker_niceness=0 ray start --head --num-gpus 0" in result.stderr
    assert "BORA_GPUS=GPU-00000001-aaaa ray start --num-gpus 1" in result.stderr
