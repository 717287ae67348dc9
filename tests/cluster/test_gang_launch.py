"""How the nodes of a gang start their shares of an engine, each with its own pinned rank."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.engine_process import EngineProcess
from cluster.engines.adapter import Launch, Rank
from cluster.engines.llamacpp import LlamacppEngine
from cluster.engines.sim import SimEngine
from cluster.engines.vllm import VllmEngine
from cluster.errors import EngineFailed
from cluster.generations import bundle, bundles, spread
from cluster.processes import free_ports
from cluster.seat import interface_of, planned_gpus
from placement.plan import NodeGpus, StageNodes
from tests.builders import a_shape, a_variant

FLAGS = ("--model", "x", "--pipeline-parallel-size", "2", "--nnodes", "2")


def a_rank(node_rank: int, **changes: Any) -> Rank:
    fields: dict[str, Any] = {
        "num_nodes": 2,
        "master_host": "10.0.0.1",
        "master_port": 29500,
        "host": f"10.0.0.{node_rank + 1}",
        "interface": "eth0",
    }
    return Rank(node_rank, **{**fields, **changes})


def vllm(node_rank: int) -> Launch:
    shape = a_shape(
        engine="vllm",
        num_nodes=2,
        pipeline_parallel_size=2,
        engine_args=FLAGS,
        engine_environment={"VLLM_PP_LAYER_PARTITION": "5,3"},
    )
    engine = VllmEngine(cache=Path("/cache"))
    variant = a_variant(gpu="H100-SXM", shape=shape)
    launch = engine.launch(variant, checkpoint="x", host="10.0.0.1", port=8000, api_key="k")
    return engine.ranked(launch, a_rank(node_rank))


@pytest.fixture(autouse=True)
def _no_interfaces_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.delenv(name, raising=False)


def test_the_leader_serves_and_is_where_the_others_meet():
    command = " ".join(vllm(0).command)

    assert "-m vllm.entrypoints.openai.api_server" in command
    assert "--nnodes 2" in command
    assert command.endswith("--node-rank 0 --master-addr 10.0.0.1 --master-port 29500")


def test_a_follower_has_the_same_flags_its_own_rank_and_no_server():
    leader, follower = vllm(0).command, vllm(1).command

    assert follower[:3] == (sys.executable, "-m", "cluster.engines.vllm_follower")
    assert follower[-1] == "--headless"
    changed = {"--headless", "1", "cluster.engines.vllm_follower"}
    assert set(follower) - set(leader) == changed


def test_layers_are_split_as_the_plan_says_on_every_node():
    assert [vllm(rank).env["VLLM_PP_LAYER_PARTITION"] for rank in (0, 1)] == ["5,3", "5,3"]


def test_ranks_talk_by_the_interface_that_has_their_nodes_address():
    env = vllm(1).env

    assert env["NCCL_SOCKET_IFNAME"] == "=eth0"
    assert env["GLOO_SOCKET_IFNAME"] == "eth0"
    assert env["VLLM_HOST_IP"] == "10.0.0.2"


def test_an_interface_that_the_operator_chose_on_the_node_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")

    assert "NCCL_SOCKET_IFNAME" not in vllm(1).env
    assert vllm(1).env["GLOO_SOCKET_IFNAME"] == "eth0"


def test_interfaces_are_found_by_address_and_a_foreign_address_is_refused():
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(EngineFailed, match=r"no network interface has the node's address 192\.0"):
        interface_of("192.0.2.255")


def test_llamacpp_is_refused():
    with pytest.raises(EngineFailed, match=r"llama\.cpp cannot run on 2 nodes"):
        LlamacppEngine().ranked(Launch((), {}), a_rank(0))


def test_a_replica_takes_its_gpus_on_each_of_its_nodes():
    one = a_variant(gpu="H100-SXM", placement=((NodeGpus(node="a", gpus=(0, 1)),),))
    gpus = tuple(range(8))
    parts = (NodeGpus(node="a", gpus=gpus), NodeGpus(node="b", gpus=gpus))
    gang = a_variant(gpu="H100-SXM", shape=a_shape(num_nodes=2), placement=(parts,))

    assert bundles(one) == [{"GPU": 2.0}]
    assert bundles(gang) == [{"GPU": 8.0}, {"GPU": 8.0}]
    assert bundle(gang) == {"GPU": 8.0}


def test_each_bundle_of_a_gang_is_sought_in_the_pool_of_its_stages():
    one = a_variant(pool="a")
    alike = a_variant(pool="a", shape=a_shape(num_nodes=2), gpus_per_replica=16)
    far = StageNodes(pool="b", gpu="RTX-4090", gpus=4)
    two = a_variant(pool="a", beside=(far,), shape=a_shape(num_nodes=2), gpus_per_replica=8)
    unequal = a_variant(
        pool="a",
        beside=(far.model_copy(update={"gpus": 2}),),
        shape=a_shape(num_nodes=3),
        gpus_per_replica=6,
    )

    seven = a_variant(
        pool="b",
        beside=(*[far] * 5, StageNodes(pool="c", gpu="A100-40-SXM", gpus=4)),
        shape=a_shape(num_nodes=7),
        gpus_per_replica=28,
    )

    assert seven.rank_pools == (*["b"] * 6, "c")
    assert spread(seven) == "STRICT_SPREAD"
    assert [variant.rank_pools for variant in (one, alike, two, unequal)] == [
        ("a",),
        ("a", "a"),
        ("a", "b"),
        ("a", "a", "b"),
    ]
    assert [spread(variant) for variant in (one, alike, two, unequal)] == [
        "STRICT_PACK",
        "STRICT_SPREAD",
        "STRICT_SPREAD",
        "PACK",
    ]


def test_planned_gpus_are_those_of_the_node_or_of_any_where_the_plan_does_not_name_it():
    parts = (NodeGpus(node="a", gpus=(0, 1)), NodeGpus(node="b", gpus=(2, 3)))
    variant = a_variant(placement=tuple((part,) for part in parts))

    assert planned_gpus(variant, "b") == [(2, 3)]
    both = a_variant(
        placement=((NodeGpus(node="a", gpus=(0, 1)), NodeGpus(node="a", gpus=(2, 3))),)
    )
    assert planned_gpus(both, "a", rank=1) == [(2, 3), (0, 1)]
    assert planned_gpus(variant, "c") == [(0, 1), (2, 3)]


async def test_a_simulated_gang_meets_before_its_leader_serves(tmp_path: Path):
    variant = a_variant()
    leader, follower = (
        EngineProcess(SimEngine(), variant, host="127.0.0.1", log=tmp_path / f"{rank}.log")
        for rank in (0, 1)
    )
    [port] = free_ports(1)
    place = {"master_host": "127.0.0.1", "master_port": port, "host": "127.0.0.1"}
    start = asyncio.create_task(leader.start("nowhere", rank=a_rank(0, **place)))
    try:
        async with asyncio.timeout(30):
            while leader.stage != "meeting the other ranks":
                await asyncio.sleep(0.05)

            follower.launch("nowhere", rank=a_rank(1, **place))
            await start
            while follower.stage != "loading weights":
                follower.follow_log()
                await asyncio.sleep(0.05)
        assert follower.status is None
    finally:
        start.cancel()
        await asyncio.gather(*(asyncio.to_thread(each.stop) for each in (leader, follower)))
