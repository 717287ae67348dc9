"""An engine whose data-parallel copies stand on several nodes: flags, logs, metrics, slots."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp

from cluster.autoscaler import Autoscaler
from cluster.engine_process import EngineProcess
from cluster.engines.adapter import MEETING, EngineFacts, Launch, Rank
from cluster.engines.sim import SimEngine
from cluster.engines.vllm import VllmEngine
from cluster.processes import free_ports
from cluster.registry import Registry
from gateway.endpoints import ModelLoad
from placement.fleet import ReplicaBounds, ScalingPolicy
from tests.builders import a_report, a_shape, a_variant

ENGINE = VllmEngine(cache=Path("/cache"))
FLAGS = ("--model", "x", "--nnodes", "2", "--data-parallel-size", "16")
LEADER_LOG = """
(ApiServer pid=1) INFO 11-22 19:00:00 [utils.py:1253] Started DP Coordinator process (PID: 9)
(Worker_DP0 pid=5) INFO 11-22 19:00:40 [gpu_model_runner.py:5000] Model loading took 44.00 GiB memory
(Worker_DP1 pid=6) INFO 11-22 19:00:41 [gpu_model_runner.py:5000] Model loading took 44.25 GiB memory
(EngineCore_DP0 pid=3) INFO 11-22 19:01:00 [kv_cache_utils.py:2327] GPU KV cache size: 100,000 tokens, Maximum concurrency
(EngineCore_DP1 pid=4) INFO 11-22 19:01:00 [kv_cache_utils.py:2327] GPU KV cache size: 100,016 tokens, Maximum concurrency
"""
FOLLOWER_LOG = """
INFO 11-22 19:00:00 [serve.py:237] Launching 2 data parallel engine(s) in headless mode, with head node address tcp://10.0.0.1:29600.
(Worker_DP2 pid=5) INFO 11-22 19:00:40 [gpu_model_runner.py:5000] Model loading took 44.50 GiB memory
(EngineCore_DP2 pid=3) INFO 11-22 19:01:00 [kv_cache_utils.py:2327] GPU KV cache size: 99,984 tokens, Maximum concurrency
(EngineCore_DP3 pid=4) INFO 11-22 19:01:00 [kv_cache_utils.py:2327] GPU KV cache size: 100,000 tokens, Maximum concurrency
"""


def a_rank(node_rank: int, **changes: Any) -> Rank:
    fields: dict[str, Any] = {
        "num_nodes": 2,
        "master_host": "10.0.0.1",
        "master_port": 29500,
        "host": f"10.0.0.{node_rank + 1}",
        "interface": "eth0",
        "rpc_port": 29600,
    }
    return Rank(node_rank, **{**fields, **changes})


def launch(node_rank: int, flags: tuple[str, ...] = FLAGS) -> Launch:
    shape = a_shape(engine="vllm", num_nodes=2, data_parallel_size=16, engine_args=flags)
    started = ENGINE.launch(
        a_variant(gpu="H100-SXM", shape=shape),
        checkpoint="x",
        host="10.0.0.1",
        port=8000,
        api_key="k",
    )
    return ENGINE.ranked(started, a_rank(node_rank))


def test_copies_of_all_nodes_register_at_a_port_of_this_engine_alone():
    for node_rank in (0, 1):
        command = " ".join(launch(node_rank).command)

        assert "--data-parallel-address 10.0.0.1 --data-parallel-rpc-port 29600" in command
        assert f"--node-rank {node_rank} --master-addr 10.0.0.1 --master-port 29500" in command
    assert "-m cluster.engines.vllm_follower" in command
    assert command.endswith("--headless")


def test_pipelines_have_no_such_port():
    assert "--data-parallel-rpc-port" not in launch(0, ("--model", "x", "--nnodes", "2")).command


def test_a_node_whose_copies_wait_for_those_of_others_meets_them():
    told = [
        [stage for line in log.splitlines() if (stage := ENGINE.stage(line))]
        for log in (LEADER_LOG, FOLLOWER_LOG)
    ]

    assert [stages[0] for stages in told] == [MEETING, MEETING]


def test_caches_of_copies_add_up_over_nodes_and_the_heaviest_rank_counts():
    leader, follower = (ENGINE.facts(log) for log in (LEADER_LOG, FOLLOWER_LOG))

    assert leader == EngineFacts(200_016, round(44.25 * 2**30))
    assert leader.with_copies([follower]) == EngineFacts(400_000, round(44.5 * 2**30))
    assert leader.with_copies([EngineFacts()]) == leader
    assert EngineFacts().with_copies([]) == EngineFacts()


def test_a_cache_that_is_told_twice_counts_once():
    line = LEADER_LOG.splitlines()[-1]

    assert ENGINE.facts(f"{line}\n{line}").kv_cache_tokens == 100_016


def test_every_copy_has_slots_for_the_gateway_and_for_scaling():
    variant = a_variant(
        bounds=ReplicaBounds(min=1, max=4),
        scaling=ScalingPolicy(scale_up_delay_s=0),
        shape=a_shape(max_num_seqs=8, data_parallel_size=4),
    )
    registry, scaler = Registry(), Autoscaler()
    registry.report(a_report(), now_s=0)
    scaler.adopt(variant, running=False)
    scaler.observe("g", {"chat": ModelLoad(in_flight=44, queued=0, requests_total=0)}, now_s=0)

    [endpoint] = registry.table([variant], version=1).endpoints
    decision = scaler.decide(variant, 1, now_s=0)

    assert endpoint.max_in_flight == 64
    assert decision is not None
    assert decision.target == 2  # 44 / (0.7 x 32)


async def test_a_simulated_gang_tells_of_its_copies_on_each_node(tmp_path: Path):
    shape = a_shape(num_nodes=2, data_parallel_size=4, kv_cache_tokens=400_000)
    variant = a_variant(shape=shape)
    leader, follower = (
        EngineProcess(SimEngine(), variant, host="127.0.0.1", log=tmp_path / f"{rank}.log")
        for rank in (0, 1)
    )
    [port] = free_ports(1)
    place = {"master_host": "127.0.0.1", "master_port": port, "host": "127.0.0.1"}
    try:
        follower.launch("nowhere", rank=a_rank(1, **place))
        async with asyncio.timeout(30):
            await leader.start("nowhere", rank=a_rank(0, **place))
            while "EngineCore_DP3" not in follower.log.read_text():
                await asyncio.sleep(0.05)
        follower.read_facts()
        async with aiohttp.ClientSession() as session:
            key = {"authorization": f"Bearer {leader.api_key}"}
            async with session.get(f"{leader.url}/metrics", headers=key) as response:
                metrics = await response.text()
    finally:
        await asyncio.gather(*(asyncio.to_thread(each.stop) for each in (leader, follower)))

    assert leader.facts.kv_cache_tokens == follower.facts.kv_cache_tokens == 200_000
    assert leader.facts.with_copies([follower.facts]).kv_cache_tokens == shape.kv_cache_tokens
    running = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_run")]
    assert [f'engine="{copy}"' in line for copy, line in enumerate(running)] == [True] * 4


EXCHANGE = """
import json, sys
from datetime import timedelta
import torch
from torch import distributed
from cluster.engines.cpu_expert_exchange import let_copies_exchange

class CpuCommunicator:
    world_size = 2

class Module:
    pass

Module.CpuCommunicator = CpuCommunicator
let_copies_exchange(Module)
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group(
    "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
copy = CpuCommunicator()
copy.rank_in_group, copy.device_group = rank, distributed.group.WORLD
sizes = [1, 3]
own = torch.full((sizes[rank], 2), float(rank + 1))
ids = torch.arange(sizes[rank]) + 10 * rank
rows, numbers = copy.all_gatherv([own, ids], dim=0, sizes=sizes)
summed = copy.reduce_scatterv(rows * (rank + 1), dim=0, sizes=sizes)
alike = copy.all_gatherv(torch.full((1,), rank))
print(json.dumps([rows.tolist(), numbers.tolist(), summed.tolist(), alike.tolist()]))
"""


def test_copies_on_the_cpu_gather_unequal_numbers_of_tokens_and_share_out_the_sums(tmp_path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGE, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in processes)

    everything = [[1.0, 1.0], *[[2.0, 2.0]] * 3]
    assert first[:2] == second[:2] == [everything, [0, 10, 11, 12]]
    assert first[2] == [[3.0, 3.0]]  # once from each rank, the second's doubled
    assert second[2] == [[6.0, 6.0]] * 3
    assert first[3] == second[3] == [0, 1]
