"""Attention in copies and experts over all GPUs of several nodes (data and expert parallel)."""

from __future__ import annotations

from typing import Any

import pytest

from placement.candidate import Candidate
from placement.efficiency import exchange
from placement.errors import ConfigError
from placement.expert_exchange import exchange_args, exchange_bytes
from placement.expert_nodes import over_fewest_nodes
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Links, Pool
from placement.legality import first_rejection
from placement.memory import activation_bytes, memory_use, stages_of
from placement.node_groups import NodeGroup
from placement.plan import Plan, Variant
from placement.planner import make_plan
from placement.spec import parse_yaml
from placement.weight_bytes import weights_bytes
from tests.placement.builders import (
    CATALOGUE,
    a_candidate,
    a_fleet,
    a_gpu_device,
    a_model,
    a_pool,
    an_architecture,
    an_inventory,
    experts,
)

LARGE_3 = "mistral-large-3-675b-2512"  # 680 GB in FP8: more than eight H100 hold
MIXTURE = a_model(
    architecture=an_architecture(
        hidden_size=100, moe=experts(expert_intermediate_size=512, num_experts=16)
    )
)


def a_large_wish(**changes: Any) -> FleetModel:
    fields = {"model": LARGE_3, "precision": ("fp8",), "max_model_len": 32768, "max_num_seqs": 64}
    return FleetModel(name="large", **{**fields, **changes})


def plan_of(wish: FleetModel, *pools: Pool) -> Plan:
    return make_plan(a_fleet(wish), an_inventory(*pools or (two_nodes(),)), CATALOGUE)


def the_only(plan: Plan) -> Variant:
    (variant,) = plan.variants
    return variant


def two_nodes(**changes: Any) -> Pool:
    return a_pool(**{"nodes": 2, "links": Links(inter_gbps=400), **changes})


SIXTEEN = a_large_wish(nodes_per_replica=2, data_parallel_size=16)
ROOMY = two_nodes(name="h200", gpu="H200-SXM")


def copies(number: int, **changes: Any) -> Candidate:
    """Of a mixture, each of one rank, in whole experts."""
    return a_candidate(MIXTURE, data_parallel_size=number, expert_parallel=True, **changes)


def test_as_many_copies_as_the_fleet_says_stand_on_all_gpus_of_its_nodes() -> None:
    variant = the_only(plan_of(SIXTEEN, ROOMY))
    shape = variant.shape

    assert variant.variant == "large@h200-tp1-dp16-2nodes-ep"
    assert (shape.tensor_parallel_size, shape.data_parallel_size) == (1, 16)
    assert shape.expert_parallel
    assert (shape.num_nodes, shape.num_gpus, variant.gpus_per_replica) == (2, 16, 16)
    assert [len(part.gpus) for part in variant.placement[0]] == [8, 8]
    assert shape.request_slots == 16 * 64


def test_groups_and_copies_may_be_combined() -> None:
    wish = a_large_wish(nodes_per_replica=2, data_parallel_size=2, tensor_parallel_size=8)

    shape = the_only(plan_of(wish)).shape

    assert (shape.tensor_parallel_size, shape.pipeline_parallel_size) == (8, 1)
    assert "--data-parallel-size 2 --data-parallel-size-local 1" in " ".join(shape.engine_args)


def test_copies_that_are_pipelines_over_nodes_take_what_is_left() -> None:
    wish = a_large_wish(nodes_per_replica=4, data_parallel_size=2, tensor_parallel_size=8)

    shape = the_only(plan_of(wish, two_nodes(nodes=4))).shape

    assert (shape.pipeline_parallel_size, shape.data_parallel_size) == (2, 2)
    assert "--data-parallel-size 2 --data-parallel-size-local 1" in " ".join(shape.engine_args)


def test_on_one_node_copies_are_made_when_the_fleet_says_so() -> None:
    pool = a_pool(gpu="H200-SXM")
    asked = the_only(plan_of(a_large_wish(data_parallel_size=8), pool)).shape

    assert (asked.tensor_parallel_size, asked.data_parallel_size) == (1, 8)
    assert "--data-parallel-size-local" not in asked.engine_args
    assert the_only(plan_of(a_large_wish(), pool)).shape.data_parallel_size == 1


def test_experts_go_over_nodes_unasked_where_no_node_holds_the_model_and_not_over_more() -> None:
    pool = two_nodes(nodes=4)
    group = NodeGroup(pools=(pool,), spare_nodes=0)
    found = over_fewest_nodes(a_large_wish(), group, CATALOGUE)

    assert {candidate.num_nodes for candidate in found} == {2}
    assert {
        (candidate.tensor_parallel_size, candidate.data_parallel_size) for candidate in found
    } == {(1, 16), (2, 8), (4, 4), (8, 2)}
    [replica] = the_only(plan_of(a_large_wish(), pool)).placement
    assert len({part.node for part in replica}) == 2
    assert plan_of(a_large_wish(across_nodes="never"), pool).unmet


def test_without_a_demand_gpus_share_the_model_in_the_fastest_way() -> None:
    """Not in that of least groups: sixteen stages of one GPU hold as long a context."""
    shape = the_only(plan_of(a_large_wish(nodes_per_replica=2))).shape

    assert shape.pipeline_parallel_size == 1
    assert shape.data_parallel_size > 1


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "mistral-large-2411", "precision": "any"},  # dense
        {"nodes_per_replica": 2},
        {"data_parallel_size": 1},
        {"layer_partition": (31, 30)},
        {"expert_parallel": False},
    ],
)
def test_nothing_is_tried_beside_what_the_fleet_says(changes: dict[str, Any]) -> None:
    group = NodeGroup(pools=(two_nodes(),), spare_nodes=0)

    assert over_fewest_nodes(a_large_wish(**changes), group, CATALOGUE) == []


def test_a_dense_model_has_no_use_for_copies() -> None:
    wish = FleetModel(name="small", model="mistral-7b-v0.3", data_parallel_size=2)

    [unmet] = plan_of(wish).unmet

    assert "2 replicas do what data_parallel_size would" in unmet.constraint


def test_copies_lie_whole_on_nodes_or_take_whole_nodes() -> None:
    def rejection(tensor: int, stages: int, number: int, nodes: int) -> str:
        candidate = copies(
            number,
            tensor_parallel_size=tensor,
            pipeline_parallel_size=stages,
            num_nodes=nodes,
            device=a_gpu_device(gpus_per_node=4),
        )
        found = first_rejection(candidate)
        return found.reason if found else ""

    assert rejection(1, 2, 4, nodes=2) == ""  # two copies a node
    assert rejection(2, 2, 2, nodes=4) == ""  # two nodes a copy
    assert (
        rejection(1, 3, 4, nodes=3)
        == "data-parallel copies of 3 ranks do not lie evenly on nodes of 4 ranks"
    )


def test_each_copy_has_all_of_the_attention_and_a_share_of_the_experts() -> None:
    model = CATALOGUE.model(LARGE_3)
    fp8 = next(entry for entry in model.checkpoints if entry.precision == "fp8")
    common = {"checkpoint": fp8, "expert_parallel": True, "num_nodes": 2, "max_model_len": 32768}
    groups, single = (
        a_candidate(model, tensor_parallel_size=size, data_parallel_size=16 // size, **common)
        for size in (8, 1)
    )

    per_layer = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    attention = 61 * per_layer
    assert weights_bytes(single) - weights_bytes(groups) > 0.8 * attention
    assert weights_bytes(single) > 58 * 8 * 3 * 7168 * 4096  # 8 of 128 experts
    one = memory_use(single).stages[0].kv
    assert memory_use(single).kv.tokens == 16 * int(one.num_blocks / one.blocks_per_request * 32768)


def test_buffers_hold_the_tokens_of_all_copies_once_for_each_expert_of_a_token() -> None:
    """Two experts of 512 a token, hidden states of 100: 2 x (512 + 1024) + 2 x 100 numbers."""
    candidate = copies(4, max_num_batched_tokens=1000)
    [stage] = stages_of(candidate)

    assert exchange_bytes(candidate, stage) == 4 * 1000 * (2 * (512 + 1024) + 200) * 2
    assert exchange_bytes(copies(1), stage) == 0
    more = activation_bytes(candidate) - activation_bytes(copies(1, max_num_batched_tokens=1000))
    assert more == exchange_bytes(candidate, stage)


def test_a_step_of_all_copies_together_is_bounded_unless_the_fleet_says_otherwise() -> None:
    asked = SIXTEEN.model_copy(update={"max_num_batched_tokens": 2048})

    assert the_only(plan_of(SIXTEEN, ROOMY)).shape.max_num_batched_tokens == 1024
    assert the_only(plan_of(asked, ROOMY)).shape.max_num_batched_tokens == 2048


def test_tokens_leave_a_node_once_over_all_of_its_network_cards() -> None:
    """Gathered and scattered: 15/16 of the tokens of 16 copies, each way."""
    device = a_gpu_device(inter_node_bytes_per_s=50e9)

    sixteen = exchange(copies(16, num_nodes=2, device=device))
    grouped = exchange(copies(2, tensor_parallel_size=8, num_nodes=2, device=device))

    assert sixteen.s_per_byte == pytest.approx(2 * 15 / 50e9)
    assert grouped.s_per_byte == pytest.approx(2 * 2 * 15 / 16 / 50e9)


def test_parts_of_experts_need_the_tokens_on_every_rank_of_a_group() -> None:
    device = a_gpu_device(inter_node_bytes_per_s=50e9)
    changes = {"tensor_parallel_size": 8, "num_nodes": 2, "device": device}

    whole, parts = (
        exchange(a_candidate(MIXTURE, data_parallel_size=2, expert_parallel=parallel, **changes))
        for parallel in (True, False)
    )

    assert parts.s_per_byte == pytest.approx(8 * 2 * 2 / 2 / 50e9)
    assert parts.s_per_byte > 4 * whole.s_per_byte


def test_without_a_network_copies_talk_by_the_link_inside_the_node() -> None:
    inside = exchange(copies(8))
    across = exchange(copies(8, num_nodes=2, device=a_gpu_device(gpus_per_node=4)))

    assert across.latency_s > 2 * inside.latency_s
    assert across.s_per_byte > 10 * inside.s_per_byte


def test_flags_name_copies_and_the_exchange_that_needs_no_package() -> None:
    assert exchange_args(copies(1)) == ()
    assert " ".join(exchange_args(copies(16, num_nodes=2))) == (
        "--data-parallel-size 16 --data-parallel-size-local 8 "
        "--all2all-backend allgather_reducescatter"
    )


def test_a_plan_over_nodes_tells_that_experts_are_reached_over_the_network() -> None:
    notes = the_only(plan_of(SIXTEEN, ROOMY)).shape.notes
    [note] = [note for note in notes if "network" in note]

    assert "tokens of 16 copies cross the network between 2 nodes, of 400 Gbit/s a node" in note


@pytest.mark.parametrize(
    "flag",
    ["--data-parallel-size=2", "--data-parallel-rank", "-dp", "-dpr", "--data_parallel_size"],
)
def test_flags_of_data_parallelism_are_refused_with_the_key_that_sets_them(flag: str) -> None:
    text = f"{{fleet: f, models: [{{name: m, model: x, engine_args: ['{flag}']}}]}}"

    with pytest.raises(ConfigError, match="use data_parallel_size"):
        parse_yaml(text, FleetSpec, source="fleet.yaml")
