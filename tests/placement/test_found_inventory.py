"""An inventory out of what probes found."""

from __future__ import annotations

from typing import Any

import pytest

from placement.catalogue import load_catalogue
from placement.checkpoint_room import checkpoint_bytes
from placement.errors import UnknownName
from placement.found_inventory import device_kinds, pools_of, with_findings
from placement.inventory import Inventory, Links, Pool
from placement.node_facts import MigSlice, NicFacts
from placement.planner import make_plan
from tests.builders import a_plan, a_shape, a_variant
from tests.placement.builders import a_fleet, a_wish
from tests.placement.nodes import GIB, a_4090, a_gpu, a_node, pairs

CATALOGUE = load_catalogue()


def slices(count: int, profile: str = "3g.40gb", gib: float = 39.5) -> tuple[MigSlice, ...]:
    return tuple(
        MigSlice(profile=profile, uuid=f"MIG-{index}", memory_bytes=int(gib * GIB))
        for index in range(count)
    )


def declared(**changes: Any) -> Inventory:
    fields: dict[str, Any] = {
        "name": "h100", "gpu": "H100-SXM", "gpus_per_node": 8, "node_names": ("h1-0000abcd",),
    }  # fmt: skip
    return Inventory(pools=(Pool(**{**fields, **changes}),))


def test_measured_memory_link_and_network_replace_the_catalogue():
    [pool] = with_findings(declared(), [a_node()]).pools

    assert pool.memory_gib_per_gpu == 79.1
    assert pool.links == Links(intra="nvlink", inter_gbps=400)
    assert pool.host_memory_gib == 2015


def test_the_weakest_node_decides_for_its_pool():
    weak = a_node(
        "h2",
        gpus=tuple(a_gpu(i, torch_memory_bytes=70 * GIB) for i in range(8)),
        nics=(NicFacts(name="eth0", gbps=100.0),),
        pairs=(*pairs(8)[:-1], pairs(8)[-1].model_copy(update={"peer": "NS"})),
    )
    both = declared(nodes=2, node_names=("h1", "h2"))

    [pool] = with_findings(both, [a_node("h1"), weak]).pools

    assert (pool.memory_gib_per_gpu, pool.links.inter_gbps) == (70.0, 100)
    assert pool.links.intra == "pcie-no-p2p"


@pytest.mark.parametrize(
    "node",
    [
        a_node(gpus=(), pairs=()),
        a_node(gpus=tuple(a_gpu(index) for index in range(7))),
        a_node(gpus=(*(a_gpu(index) for index in range(7)), a_4090(7))),
        a_node("elsewhere"),
    ],
)
def test_where_the_count_is_wrong_the_declaration_stays_for_the_mismatch_to_tell(node):
    [pool] = with_findings(declared(), [node]).pools

    assert (pool.gpu, pool.gpus_per_node) == ("H100-SXM", 8)
    assert pool.memory_gib_per_gpu is None


def test_amx_is_found_where_all_nodes_have_it():
    slots = declared(gpu="cpu", memory_gib_per_gpu=4.0, kv_cache_gib_per_gpu=1.0)
    node = a_node(gpus=(), pairs=(), cpu_features=("avx2", "amx_bf16"))

    assert with_findings(slots, [node]).pools[0].labels == {"amx": "true"}


def test_a_mixed_box_becomes_a_pool_for_each_kind():
    box = a_node(
        gpus=(a_4090(0), a_gpu(1), a_gpu(2)),
        pairs=tuple(
            pair.model_copy(update={"path": "NV18" if pair.first == 1 else "PHB"})
            for pair in pairs(3)
        ),
    )

    rtx, h100 = pools_of(box, CATALOGUE, "box")

    assert (rtx.name, rtx.gpu, rtx.gpus_per_node) == ("box-rtx-4090", "RTX-4090", 1)
    assert (h100.name, h100.gpu, h100.gpus_per_node) == ("box-h100-sxm", "H100-SXM", 2)
    assert h100.links.intra == "nvlink"
    assert Inventory(pools=(rtx, h100))


def test_slices_are_devices_and_the_card_that_they_cut_is_none():
    box = a_node(gpus=(a_gpu(0, mig=True, mig_slices=slices(2)), a_gpu(1)), pairs=())

    kinds = device_kinds(box, CATALOGUE)

    assert kinds == {"H100-SXM-MIG-3g.40gb": ("MIG-0", "MIG-1"), "H100-SXM": ("GPU-1",)}
    cut, whole = pools_of(box, CATALOGUE, "box")
    assert (cut.gpus_per_node, cut.memory_gib_per_gpu) == (2, 39.5)
    assert (whole.gpus_per_node, whole.memory_gib_per_gpu) == (1, 79.1)


def test_a_plan_on_slices_takes_one_slice_a_replica():
    box = a_node(gpus=(a_gpu(0, mig=True, mig_slices=slices(2)),), pairs=())
    offered = Inventory(pools=pools_of(box, CATALOGUE, "box"))
    wish = a_wish(model="ministral-8b-2410", max_model_len=8192)

    plan = make_plan(a_fleet(wish), offered, CATALOGUE)

    [variant] = plan.variants
    assert variant.gpu == "H100-SXM-MIG-3g.40gb"
    assert variant.shape.tensor_parallel_size == 1
    assert variant.shape.per_gpu.total_bytes <= 39.5 * GIB


def test_a_slice_has_its_share_of_the_card():
    card, part = CATALOGUE.gpu("h100"), CATALOGUE.gpu("h100-MIG-3g.40gb")

    assert part.name == "H100-SXM-MIG-3g.40gb"
    assert part.bf16_flops == pytest.approx(card.bf16_flops * 3 / 7)
    assert part.memory_bandwidth_bytes_per_s == card.memory_bandwidth_bytes_per_s / 2
    assert part.nvlink_bytes_per_s == 0
    assert not part.peer_to_peer


@pytest.mark.parametrize(
    ("gpu", "profile", "eighths"),
    [
        ("A100-40-SXM", "1g.5gb", 1),
        ("A100-80-SXM", "2g.20gb", 2),
        ("H100-SXM", "7g.80gb", 8),
        ("H100-SXM", "1g.10gb+me", 1),
        ("H200-SXM", "1g.18gb", 1),
        ("H100-NVL", "3g.47gb", 4),
        ("B200", "1g.23gb", 1),
        ("B300", "1g.34gb", 1),
        ("RTX-PRO-6000", "1g.24gb-me", 2),
    ],
)
def test_memory_is_cut_in_eighths(gpu: str, profile: str, eighths: int):
    whole, part = CATALOGUE.gpu(gpu), CATALOGUE.gpu(f"{gpu}-MIG-{profile}")

    assert part.memory_bytes == int((whole.memory_bytes or 0) * eighths / 8)


@pytest.mark.parametrize(
    "name",
    [
        "H100-SXM-MIG-half", "H1000-MIG-3g.40gb", "cpu-MIG-1g.5gb",
        "H200-SXM-MIG-1g.10gb", "B200-MIG-1g.10gb",  # other cards' profiles
        "H100-SXM-MIG-9g.80gb", "H100-SXM-MIG-0g.10gb",
        "RTX-4090-MIG-1g.3gb",  # it has no MIG
        "H100-SXM-MIG-1c.3g.40gb",  # shares its memory with other compute instances
    ],
)  # fmt: skip
def test_what_is_no_slice_of_a_known_card_is_unknown(name: str):
    with pytest.raises(UnknownName):
        CATALOGUE.gpu(name)


def test_a_card_that_is_cut_in_four_is_whole_with_four_parts():
    card, whole = CATALOGUE.gpu("rtx-pro-6000"), CATALOGUE.gpu("rtx-pro-6000-MIG-4g.96gb+gfx")

    assert whole.bf16_flops == card.bf16_flops
    assert whole.memory_bytes == card.memory_bytes


def test_a_slice_is_called_alike_however_it_is_written():
    assert CATALOGUE.gpu("H100-SXM-MIG-3G.40GB").name == "H100-SXM-MIG-3g.40gb"


def test_of_ray_nodes_that_share_a_host_each_pool_gets_its_own_figures():
    """Its cards are of the other kind, whichever was probed last."""
    rtx = a_node("box", node="box-1", pool="rtx", gpus=(a_4090(0), a_4090(1)), pairs=())
    h100 = a_node("box", node="box-2", gpus=(a_gpu(2), a_gpu(3)), pairs=())
    inventory = declared(name="rtx", gpu="RTX-4090", gpus_per_node=2, node_names=("box",))

    [pool] = with_findings(inventory, [rtx, h100]).pools

    assert pool.memory_gib_per_gpu == 23.5


def test_a_known_name_on_a_card_of_another_size_is_not_taken_for_the_known_card():
    box = a_node(gpus=(a_4090(0), a_4090(1, memory_bytes=48 * GIB)), pairs=())

    kinds = device_kinds(box, CATALOGUE)

    assert kinds == {
        "RTX-4090": ("GPU-0",), "NVIDIA-GeForce-RTX-4090-48GiB": ("GPU-1",),
    }  # fmt: skip
    assert len(pools_of(box, CATALOGUE, "box")) == 2


@pytest.mark.parametrize("name", ["NVIDIA H100 (engineering sample)", "GRID A100X-40C", "(?)"])
def test_any_name_of_a_card_makes_a_pool(name: str):
    [pool] = pools_of(a_node(gpus=(a_gpu(0, name=name),), pairs=()), CATALOGUE, "box")

    assert pool.gpu.endswith("-80GiB")


def test_only_weights_that_are_downloaded_need_disk():
    def on(checkpoint: str, engine: str = "vllm") -> Any:
        shape = a_shape(engine=engine)
        return a_variant(checkpoint=checkpoint, shape=shape, pool="h100", catalogue_model="x")

    needed = checkpoint_bytes(
        a_plan(on("mistralai/A"), on("mistralai/B", "sim"), on("nano:small"), on("/models/C")),
        CATALOGUE,
    )

    assert needed == {"h100": {"mistralai/A": 47 * 10**9}}


def test_the_catalogue_knows_how_large_a_checkpoint_is():
    entry = CATALOGUE.model("mixtral-8x7b")
    sized = next(each for each in entry.checkpoints if each.size_bytes)
    variant = a_variant(
        catalogue_model=entry.name, checkpoint=sized.source, shape=a_shape(engine="vllm")
    )

    assert checkpoint_bytes(a_plan(variant), CATALOGUE) == {
        "local": {sized.source: sized.size_bytes}
    }
