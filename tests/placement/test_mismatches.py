"""What an inventory says and hosts do not bear out: every planted lie is caught by name."""

from __future__ import annotations

from typing import Any

import pytest

from placement.catalogue import load_catalogue
from placement.inventory import Inventory, Links, Pool
from placement.mismatch import Mismatch
from placement.mismatches import mismatches
from placement.node_facts import DiskFacts, Measured, MigSlice, NicFacts, NodeFacts
from tests.placement.nodes import GIB, a_4090, a_gpu, a_node, an_a100, pairs

CATALOGUE = load_catalogue()


def h100_pool(**changes: Any) -> Pool:
    fields: dict[str, Any] = {
        "name": "h100",
        "gpu": "H100-SXM",
        "gpus_per_node": 8,
        "host_memory_gib": 2048,
        "links": Links(intra="nvlink", inter_gbps=400),
        "labels": {"zone": "a"},
        "node_names": ("h1",),
    }
    return Pool(**{**fields, **changes})


def lies(pool: Pool, *found: NodeFacts, **options: Any) -> tuple[Mismatch, ...]:
    return mismatches(Inventory(pools=(pool,)), found, catalogue=CATALOGUE, **options)


def a_4090_node(**changes: Any) -> NodeFacts:
    fields: dict[str, Any] = {
        "gpus": (a_4090(0), a_4090(1)),
        "pairs": pairs(2, path="PHB", peer="CNS", copy_bytes_per_s=1.2e10),
        "pool": "rtx",
    }
    return a_node("r1", **{**fields, **changes})


A_4090_POOL = Pool(
    name="rtx",
    gpu="RTX-4090",
    gpus_per_node=2,
    links=Links(intra="pcie-no-p2p"),
    node_names=("r1",),
)


@pytest.mark.parametrize(
    ("pool", "node"),
    [
        (h100_pool(), a_node()),
        (h100_pool(node_names=None), a_node()),
        (h100_pool(node_names=("h1-0000abcd",)), a_node()),
        (h100_pool(), a_node(gpus=tuple(a_gpu(i, torch_memory_bytes=None) for i in range(8)))),
        (h100_pool(), a_node(pairs=pairs(8, copy_correct=None, copy_bytes_per_s=None))),
        (A_4090_POOL, a_4090_node()),
    ],
)
def test_an_honest_inventory_has_no_mismatch(pool: Pool, node: NodeFacts):
    assert lies(pool, node) == ()


def eight(**changes: Any) -> tuple[Any, ...]:
    return (a_gpu(0, **changes), *(a_gpu(index) for index in range(1, 8)))


A100_POOL = h100_pool(gpu="A100-80-SXM")
PCIE_POOL = h100_pool(gpu="H100-PCIe", links=Links(intra="pcie"), gpus_per_node=2)
PCIE_GPUS = tuple(a_gpu(index, name="NVIDIA H100 PCIe") for index in range(2))
MIG_SLICES = tuple(
    MigSlice(profile="3g.40gb", uuid=f"MIG-{index}", memory_bytes=40 * GIB) for index in range(2)
)
MEASURED = Measured(device="cuda", ranks=8, copy_bytes_per_s=2.6e12, took_s=9.0)
SLOW_DISK = DiskFacts(
    path="/cache", total_bytes=4000 * GIB, free_bytes=3000 * GIB, read_bytes_per_s=1.5e8
)
PLANTED = [
    # rule, pool, node, what the found side must say, what the cure must say
    (
        "gpu-memory", A100_POOL,
        a_node(gpus=tuple(an_a100(i, gib=40) for i in range(8))),
        "8 x NVIDIA A100-SXM4-40GB (40.0 GiB)", "gpu: A100-40-SXM",
    ),
    ("gpu-count", h100_pool(), a_node(gpus=eight()[:7], pairs=pairs(7)), "7 (index 0, 1", "Xid"),
    (
        "gpu-type", h100_pool(),
        a_node(gpus=tuple(an_a100(i) for i in range(8))), "A100-SXM4-80GB", "gpu: A100-80-SXM",
    ),
    ("nvlink-missing", h100_pool(), a_node(pairs=pairs(8, path="PIX", copy_correct=None,
     copy_bytes_per_s=None)), "GPU 0 and 1", "intra: pcie"),
    (
        "p2p-wrong-copies", PCIE_POOL,
        a_node(gpus=PCIE_GPUS, pairs=pairs(2, path="PHB", copy_correct=False)),
        "GPU 0 and 1: what arrives differs", "NCCL_P2P_DISABLE",
    ),
    (
        "gpu-count", h100_pool(),
        a_node(
            gpus=eight()[1:], pairs=(),
            problems=("GPU 0 (00000000:1B:00.0) cannot be used: product_name 'ERR!'",),
        ),
        "7 (index 1, 2, 3, 4, 5, 6, 7); GPU 0 (00000000:1B:00.0) cannot be used", "dmesg",
    ),
    (
        "gpu-count", h100_pool(),
        a_node(gpus=(), pairs=(), driver="", problems=("`nvidia-smi -q -x` hangs",)),
        "no GPU (`nvidia-smi -q -x` hangs)", "reload",
    ),
    (
        "gpu-count", h100_pool(gpu="H100-SXM-MIG-3g.40gb", links=Links()),
        a_node(gpus=(), pairs=(), driver=""), "no NVIDIA driver that answers", "install",
    ),
    (
        "gpu-memory",
        h100_pool(
            gpu="H100-SXM-MIG-3g.40gb", gpus_per_node=2, memory_gib_per_gpu=60, links=Links()
        ),
        a_node(gpus=(a_gpu(mig=True, mig_slices=MIG_SLICES),), pairs=()),
        "40.00 GiB", "memory_gib_per_gpu: 40.0",
    ),
    (
        "ecc-errors", h100_pool(gpu="H100-SXM-MIG-3g.40gb", gpus_per_node=2, links=Links()),
        a_node(gpus=(a_gpu(mig=True, mig_slices=MIG_SLICES, remapping="failed"),), pairs=()),
        "remapping failed", "replaced",
    ),
    (
        "p2p-unavailable", PCIE_POOL,
        a_node(gpus=PCIE_GPUS, pairs=pairs(2, path="PHB", peer="CNS")), "CNS", "pcie-no-p2p",
    ),
    ("host-memory", h100_pool(), a_node(host_memory_bytes=1007 * GIB), "1007.0 GiB", "1007"),
    ("pcie-width", h100_pool(), a_node(gpus=eight(pcie_width=4)), "GPU 0 on x4", "x16 slot"),
    (
        "mig-on", h100_pool(),
        a_node(gpus=eight(mig=True, mig_slices=MIG_SLICES)), "3g.40gb, 3g.40gb",
        "gpu: H100-SXM-MIG-3g.40gb",
    ),
    ("ecc-off", h100_pool(), a_node(gpus=eight(ecc=False)), "GPU 0 (GPU-0): ECC is off", "-e 1"),
    (
        "ecc-errors", h100_pool(),
        a_node(gpus=eight(uncorrected_errors=3, remapping="pending")), "3 uncorrected", "reset",
    ),
    (
        "ecc-errors", h100_pool(), a_node(gpus=eight(remapping="failed")),
        "remapping failed", "replaced",
    ),
    ("driver-too-old", h100_pool(), a_node(driver="550.127.05"), "550.127.05", "driver 580"),
    ("node-missing", h100_pool(node_names=("h9",)), a_node(pool=""), "not in", "start it"),
    ("node-missing", h100_pool(nodes=2, node_names=None), a_node(), "not in", "start it"),
    (
        "disk-too-small", h100_pool(),
        a_node(disk=DiskFacts(path="/cache", total_bytes=500 * GIB, free_bytes=100 * GIB)),
        "100.0 GiB free of 500.0 in /cache", "HF_HOME",
    ),
    ("label-wrong", h100_pool(), a_node(labels={"zone": "b"}), "zone: b", "zone=a"),
    (
        "label-wrong", h100_pool(), a_node(labels={"ray.io/availability-zone": "b"}),
        "zone: b", "zone=a",
    ),
    ("label-wrong", h100_pool(), a_node(labels={"rack": "1"}), "no label zone", "zone=a"),
    ("clock-skew", h100_pool(), a_node(clock_offset_s=-40.0), "40.0 s behind", "chrony"),
    (
        "network-slow", h100_pool(), a_node(nics=(NicFacts(name="eth0", gbps=25.0),)),
        "25 Gbit/s (eth0 25)", "inter_gbps: 25",
    ),
    ("gpu-count", h100_pool(), a_node(gpus=(), pairs=(), driver=""), "no NVIDIA driver", "install"),
    (
        "gpu-memory", h100_pool(memory_gib_per_gpu=100), a_node(), "GPU 0", "memory_gib_per_gpu: 79",
    ),
    ("link-slow", h100_pool(), a_node(pairs=pairs(8, copy_bytes_per_s=2e10)), "20.0 GB/s", "cables"),
    (
        "link-slow", h100_pool(),
        a_node(pairs=pairs(8, copy_bytes_per_s=1.9e11)), "190.0 GB/s", "nvlink --status",
    ),
    (
        "compute-capability", h100_pool(), a_node(gpus=eight(compute_capability="8.0")),
        "GPU 0 (NVIDIA H100 80GB HBM3): 8.0", "not what its name says",
    ),
    (
        "gpu-memory-taken", h100_pool(),
        a_node(gpus=eight(used_bytes=9 * GIB), measured=MEASURED),
        "GPU 0: 9.0 GiB in use", "nvidia-smi",
    ),
    (
        "host-copies-slow", h100_pool(),
        a_node(gpus=eight(host_to_device_bytes_per_s=3e9), measured=MEASURED),
        "GPU 0: 3.0 GB/s", "retrains",
    ),
    (
        "gpu-memory-slow", h100_pool(),
        a_node(measured=MEASURED.model_copy(update={"copy_bytes_per_s": 4e11})),
        "400 GB/s on the slowest", "power",
    ),
    (
        "disk-slow", h100_pool(), a_node(disk=SLOW_DISK, measured=MEASURED),
        "150 MB/s in /cache", "13 times later",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "pool", "node", "found", "cure"), PLANTED)
def test_a_planted_lie_is_caught_by_name_with_host_and_cure(
    rule: str, pool: Pool, node: NodeFacts, found: str, cure: str
):
    checkpoints = {"h100": {"mistralai/Mistral-Large-3": 700 * GIB}}

    caught = lies(pool, node, checkpoints=checkpoints if rule == "disk-too-small" else None)

    assert {lie.rule for lie in caught} == {rule}
    assert found in caught[0].found
    assert cure in caught[0].cure
    assert caught[0].host in ("h1", "h9", "1 of 2 nodes")
    assert caught[0].pool == "h100"


def test_what_engines_hold_is_not_taken_by_others():
    """Only where a run on the devices had them to itself is it known whose memory is in use."""
    assert lies(h100_pool(), a_node(gpus=eight(used_bytes=70 * GIB))) == ()


def test_a_gpu_that_two_ray_nodes_of_a_host_offer_is_counted_twice():
    one, two = a_node(), a_node(node="h1-0000dcba")
    pool = h100_pool(nodes=2, node_names=("h1-0000abcd", "h1-0000dcba"))

    [lie] = lies(pool, one, two)

    assert (lie.rule, lie.severity) == ("gpu-counted-twice", "error")
    assert "8 of them belong to h1-0000abcd too" in lie.found
    cut = a_gpu(0, mig=True, mig_slices=MIG_SLICES)
    slices = h100_pool(
        nodes=2, node_names=pool.node_names, gpu="H100-SXM-MIG-3g.40gb", gpus_per_node=2,
        links=Links(),
    )  # fmt: skip
    each = [node.model_copy(update={"gpus": (cut,), "pairs": ()}) for node in (one, two)]
    assert lies(slices, *each) == ()


def test_several_lies_of_one_host_are_all_told():
    node = a_node(
        driver="470.42", host_memory_bytes=500 * GIB, gpus=eight(pcie_width=1)[:6], pairs=pairs(6)
    )

    caught = lies(h100_pool(), node)

    assert [lie.rule for lie in caught] == [
        "gpu-count", "pcie-width", "host-memory", "driver-too-old",
    ]  # fmt: skip


def test_a_pool_without_names_may_start_its_nodes_later():
    [counted] = lies(h100_pool(nodes=2, node_names=None), a_node())
    [named] = lies(h100_pool(nodes=2, node_names=("h1", "h9")), a_node())

    assert (counted.severity, named.severity) == ("warning", "error")


def test_x8_slows_a_plan_down_and_x4_spoils_it():
    [eight_lanes] = lies(h100_pool(), a_node(gpus=eight(pcie_width=8)))
    [four_lanes] = lies(h100_pool(), a_node(gpus=eight(pcie_width=4)))

    assert (eight_lanes.severity, four_lanes.severity) == ("warning", "error")


def test_an_idle_gpu_on_a_slow_clock_has_its_full_link():
    assert lies(h100_pool(), a_node(gpus=eight(pcie_generation=1))) == ()


def test_a_clock_is_only_accused_beyond_the_error_of_asking_it():
    assert lies(h100_pool(), a_node(clock_offset_s=1.4, clock_error_s=0.5)) == ()
    [lie] = lies(h100_pool(), a_node(clock_offset_s=1.6, clock_error_s=0.5))
    assert (lie.rule, lie.severity) == ("clock-skew", "warning")


def test_weights_that_lie_on_the_disk_already_need_no_room():
    disk = DiskFacts(
        path="/cache", total_bytes=500 * GIB, free_bytes=GIB, cached={"org/model": 50 * GIB}
    )

    assert lies(h100_pool(), a_node(disk=disk), checkpoints={"h100": {"org/model": 50 * GIB}}) == ()


def test_geforce_cards_have_no_ecc_to_miss():
    assert lies(A_4090_POOL, a_4090_node()) == ()


def test_a_4090_with_48_gib_is_another_card():
    gpus = tuple(a_4090(index, memory_bytes=48 * GIB, torch_memory_bytes=None) for index in (0, 1))

    [lie] = lies(A_4090_POOL, a_4090_node(gpus=gpus))

    assert lie.rule == "gpu-type"
    assert "configs/gpus/" in lie.cure


def test_in_a_mixed_box_each_pool_looks_at_its_own_cards():
    box = a_node(
        "box",
        pool="",
        gpus=(a_4090(0), a_4090(1), a_gpu(2), a_gpu(3)),
        pairs=tuple(
            pair.model_copy(update={} if pair.first == 2 else {"path": "PHB", "peer": "CNS"})
            for pair in pairs(4)
        ),
    )
    both = Inventory(
        pools=(
            Pool(
                name="rtx", gpu="RTX-4090", gpus_per_node=2, node_names=("box",),
                links=Links(intra="pcie-no-p2p"),
            ),
            Pool(name="h100", gpu="H100-SXM", gpus_per_node=2, node_names=("box-0000abcd",)),
        )
    )  # fmt: skip

    assert mismatches(both, [box], catalogue=CATALOGUE) == ()


def test_the_whole_cards_of_a_box_are_not_accused_of_the_slices_of_others():
    box = a_node(
        gpus=(a_gpu(0, mig=True, mig_slices=MIG_SLICES), a_gpu(1), a_gpu(2)), pairs=pairs(3)[2:]
    )

    assert lies(h100_pool(gpus_per_node=2), box) == ()
    [lie] = lies(h100_pool(gpus_per_node=3), box)
    assert (lie.rule, lie.found) == ("mig-on", "GPU 0 is cut by MIG: 3g.40gb, 3g.40gb")


def test_declared_slices_are_counted_not_their_cards():
    cut = a_gpu(0, mig=True, mig_slices=MIG_SLICES)
    pool = h100_pool(gpu="H100-SXM-MIG-3g.40gb", gpus_per_node=2, links=Links())

    assert lies(pool, a_node(gpus=(cut,), pairs=())) == ()
    [lie] = lies(pool, a_node(gpus=(a_gpu(0),), pairs=()))
    assert (lie.rule, lie.found) == ("gpu-count", "no MIG slice")


def test_a_cpu_build_of_torch_on_a_gpu_host_is_told():
    node = a_node(measured={"device": "cpu", "ranks": 2, "took_s": 1.0})

    [lie] = lies(h100_pool(), node)

    assert lie.rule == "gpu-unusable"
    assert "requirements/gpu.txt" in lie.cure


def test_the_host_whose_packages_differ_from_the_others_is_named():
    odd = a_node("h3", versions={"bora": "0.1.0", "ray": "2.59.0"})
    pool = h100_pool(nodes=3, node_names=("h1", "h2", "h3"))

    [lie] = lies(pool, a_node("h1"), a_node("h2"), odd)

    assert (lie.rule, lie.host, lie.severity) == ("version-differs", "h3", "error")
    assert "ray 2.60.0, as on 2 of 3 hosts" in lie.declared


def test_slots_need_the_memory_that_they_were_declared_with():
    pool = Pool(
        name="cpu", gpu="cpu", gpus_per_node=4, memory_gib_per_gpu=8.0, kv_cache_gib_per_gpu=1.0,
        node_names=("c1",),
    )  # fmt: skip
    node = a_node("c1", gpus=(), pairs=(), driver="", host_memory_bytes=16 * GIB)

    [lie] = lies(pool, node)

    assert (lie.rule, lie.declared) == (
        "host-memory", "32 GiB (memory_gib_per_gpu x gpus_per_node)",
    )  # fmt: skip


def test_slots_that_are_declared_with_amx_must_have_it():
    pool = Pool(
        name="cpu", gpu="cpu", gpus_per_node=1, memory_gib_per_gpu=8.0, kv_cache_gib_per_gpu=1.0,
        node_names=("c1",), labels={"amx": "true"},
    )  # fmt: skip
    node = a_node("c1", gpus=(), pairs=(), driver="", cpu="AMD EPYC 7763", cpu_features=("avx2",))

    [lie] = lies(pool, node)

    assert (lie.rule, lie.found) == ("label-wrong", "AMD EPYC 7763, which does not show amx_bf16")
    assert lies(pool, node.model_copy(update={"cpu_features": ("amx_bf16",)})) == ()


@pytest.mark.parametrize("names", [None, ("h1",)])
def test_a_node_that_carries_a_pools_label_and_is_not_declared_is_named(
    names: tuple[str, ...] | None,
):
    pool = h100_pool(node_names=names)

    [lie] = lies(pool, a_node("h1"), a_node("h2"))

    assert (lie.rule, lie.host, lie.severity) == ("node-undeclared", "h2", "warning")


def test_a_host_that_was_asked_without_ray_has_no_labels_to_be_wrong():
    assert lies(h100_pool(), a_node(labels={})) == ()


def test_a_mismatch_reads_as_one_sentence():
    [lie] = lies(h100_pool(), a_node(driver="550.127.05"))

    assert str(lie) == (
        "h1: driver-too-old: declared torch 2.13.0 (CUDA 13.0), which needs driver 580.65.06 or "
        "later; found driver 550.127.05. Cure: install driver 580 or later, or an engine built "
        "for an older CUDA"
    )
