"""Real vLLM with a process tree a "node", on this machine: data-parallel copies that share experts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoints import locate
from cluster.engines.adapter import Launch, Rank
from cluster.engines.vllm import VllmEngine
from cluster.processes import free_ports, start_guarded, stop_guarded, tail
from placement.catalogue import load_catalogue
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.plan import Variant
from placement.planner import make_plan

pytestmark = pytest.mark.engine

ENGINE = VllmEngine()
HERE = "127.0.0.1"
PROMPTS = ("The bora blows", "def fibonacci(n):", "Once upon a time,", "Roses are red. " * 40)


def planned(nodes: int, copies: int, gpus_per_node: int = 1, **changes: Any) -> Variant:
    """A mixture on so many nodes, float32, so that the order of additions hardly matters."""
    fields: dict[str, Any] = {
        "model": "nano-mixtral",
        "dtype": "float32",
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "tensor_parallel_size": 1,
        "nodes_per_replica": nodes,
        "data_parallel_size": copies,
    }
    wish = FleetModel(name="chat", **{**fields, **changes})
    pool = Pool(
        name="here",
        gpu="cpu",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        memory_gib_per_gpu=6,
        kv_cache_gib_per_gpu=0.25,
    )
    fleet = FleetSpec(fleet="test", models=(wish,))
    [variant] = make_plan(fleet, Inventory(pools=(pool,)), load_catalogue()).variants
    return variant


def launches(variant: Variant, port: int) -> list[Launch]:
    """Of each node's share."""
    master_port, rpc_port = free_ports(2)
    whole = ENGINE.launch(
        variant, checkpoint=locate(variant), host=HERE, port=port, api_key="secret"
    )
    nodes = variant.shape.num_nodes
    if nodes == 1:
        return [whole]
    rank = Rank(0, nodes, HERE, master_port, HERE, "lo", rpc_port)
    return [ENGINE.ranked(whole, replace(rank, node_rank=number)) for number in range(nodes)]


class Running:
    """Shares of an engine, as processes of this machine."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        [port] = free_ports(1)
        self.url = f"http://{HERE}:{port}"
        self.logs: list[Path] = []
        self._processes: list[Any] = []
        for number, launch in enumerate(launches(variant, port)):
            self.logs.append(folder / f"{number}.log")
            started = start_guarded(launch.command, log=self.logs[-1], env=launch.env, grace_s=5.0)
            self._processes.append(started)

    def wait(self, timeout_s: float = 300) -> None:
        """Until it answers."""
        until = time.monotonic() + timeout_s
        while not self._healthy():
            for process, log in zip(self._processes, self.logs, strict=True):
                assert process.poll() is None, tail(log, 40)
                assert time.monotonic() < until, tail(log, 40)
            time.sleep(0.2)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """Of the leader's server."""
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps({"model": "chat", **body}).encode(),
            headers={"authorization": "Bearer secret", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return str(response.read().decode())

    def greedy(self) -> list[list[int]]:
        """Tokens of the prompts, asked all at once."""
        options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = json.loads(self.ask("/v1/completions", {"prompt": PROMPTS, **options}))
        return [choice["token_ids"] for choice in answer["choices"]]

    def stop(self) -> None:
        """All of it."""
        for process in self._processes:
            stop_guarded(process)

    def _healthy(self) -> bool:
        try:
            self.ask("/health")
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Greedy tokens of one engine with one rank."""
    engine = Running(planned(1, 1), tmp_path_factory.mktemp("alone"))
    try:
        engine.wait()
        return engine.greedy()
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def both(
    alone: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Variant]]:
    """A copy on each of two nodes, after the engine that is alone has ended."""
    del alone
    variant = planned(2, 2)
    engine = Running(variant, tmp_path_factory.mktemp("both"))
    try:
        engine.wait()
        yield engine, variant
    finally:
        engine.stop()


def test_copies_on_two_nodes_answer_as_one_engine_does(
    both: tuple[Running, Variant], alone: list[list[int]]
) -> None:
    engine, _ = both

    assert engine.greedy() == alone


def test_requests_are_shared_out_over_the_copies_of_both_nodes(
    both: tuple[Running, Variant],
) -> None:
    engine, _ = both
    before = tokens_of_copies(engine)
    engine.greedy()

    assert all(now > then for now, then in zip(tokens_of_copies(engine), before, strict=True))
    assert ENGINE.load(engine.ask("/metrics")).running == 0


def test_every_node_tells_of_its_own_copy_what_the_planner_predicts(
    both: tuple[Running, Variant],
) -> None:
    engine, variant = both
    leader, follower = (ENGINE.facts(log.read_text()) for log in engine.logs)
    weights = variant.shape.per_gpu.weights_bytes

    assert leader.with_copies([follower]).kv_cache_tokens == variant.shape.kv_cache_tokens
    assert leader.kv_cache_tokens == follower.kv_cache_tokens
    assert leader.weights_bytes == pytest.approx(weights, rel=0.01)
    assert follower.weights_bytes == pytest.approx(weights, rel=0.01)


def tokens_of_copies(engine: Running) -> list[float]:
    """That each has made, by the metrics of the one server."""
    return [
        float(line.split()[-1])
        for line in engine.ask("/metrics").splitlines()
        if line.startswith("vllm:generation_tokens_total{")
    ]


UNDERSTOOD = """
import json, sys
from vllm import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(headless=parsed.headless)
parallel = config.parallel_config
names = (
    "data_parallel_size", "data_parallel_size_local", "data_parallel_rank", "node_rank",
    "data_parallel_master_ip", "data_parallel_rpc_port", "master_port", "enable_expert_parallel",
    "all2all_backend", "nnodes_within_dp", "local_engines_only",
)
print(json.dumps({name: getattr(parallel, name) for name in names}))
"""


def understood(launch: Launch) -> dict[str, Any]:
    """What vLLM makes of a node's flags."""
    command = [sys.executable, "-c", UNDERSTOOD, *launch.command[3:]]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_vllm_understands_the_flags_of_both_of_two_nodes_of_eight() -> None:
    variant = planned(2, 16, gpus_per_node=8, model="nano-large-3")

    leader, follower = (understood(launch) for launch in launches(variant, 8000))

    for node in (leader, follower):
        assert (node["data_parallel_size"], node["data_parallel_size_local"]) == (16, 8)
        assert node["all2all_backend"] == "allgather_reducescatter"
        assert node["enable_expert_parallel"]
        assert node["nnodes_within_dp"] == 1
        assert not node["local_engines_only"]  # the leader's server has the copies of both nodes
        assert node["data_parallel_master_ip"] == HERE
    assert (leader["data_parallel_rank"], follower["data_parallel_rank"]) == (0, 8)
    assert leader["data_parallel_rpc_port"] == follower["data_parallel_rpc_port"] != 29550
