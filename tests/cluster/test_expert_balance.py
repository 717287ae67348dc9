"""How experts are balanced, read from vLLM's log: EPLB runs on GPUs only, so from its source."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.cli.status_page import status_page
from cluster.engines.vllm import VllmEngine
from cluster.expert_log import ExpertLog
from cluster.messages import FleetStatus, ReplicaStatus, VariantStatus
from placement.serving_features import ExpertBalance, LoraLimits
from tests.builders import a_shape, a_variant
from tests.placement.test_balancing import a_plan_with

PREFIX = "(Worker_TP0_EP0 pid=71) INFO 11-22 09:18:13 [eplb_state.py:634] "


def a_line(step: int, balance: float, *, max_tokens: int = 614) -> str:
    """A line of the log, by the format string that stands in the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "distributed/eplb/eplb_state.py").read_text()
    found = re.search(r'logger\.info\(\s*((?:"[^"]*"\s*)+),\s*self\.expert_rearr', source)
    assert found is not None
    form = "".join(re.findall(r'"([^"]*)"', found[1]))
    values = (step, "mixtral-8x7b", balance * max_tokens, max_tokens, balance, 3000 - step)
    return PREFIX + form % values + "\n"


def test_the_last_measurement_counts() -> None:
    log = a_line(2250, 0.7012) + "another line\n" + a_line(2350, 0.8339)

    assert VllmEngine().expert_balance(log) == 0.8339


def test_steps_without_work_tell_nothing() -> None:
    assert VllmEngine().expert_balance(a_line(2450, 0.0, max_tokens=0)) is None
    assert VllmEngine().expert_balance("Rearranging experts (async mode) ...\n") is None


def test_the_log_is_followed_and_half_a_line_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    shape = a_shape(engine="vllm", engine_args=("--enable-eplb",))
    experts = ExpertLog(VllmEngine(), a_variant(shape=shape), log)
    seen = []
    first, second = a_line(100, 0.5), a_line(200, 0.75)
    for text in ("starting\n", first, second[:90], second[90:], "no news\n"):
        with log.open("a") as file:
            file.write(text)
        seen.append(experts.balance())

    assert seen == [None, 0.5, 0.5, 0.75, 0.75]
    assert ExpertLog(VllmEngine(), a_variant(), log).balance() is None  # it does not balance


def test_status_shows_it_beside_the_load_and_adapters_below() -> None:
    replica = ReplicaStatus(
        replica="r1", state="ready", stage="", age_s=5.0, node="n", pid=1, url="", log_file="",
        log_tail="", running=2, waiting=0, kv_cache_usage=0.0, kv_cache_tokens=None,
        weights_bytes=None, adapters={"legal": "legal"},
        adapter_failures={"medical": "LoRA rank 64 is greater than max_lora_rank 16."},
        expert_balance=0.8339,
    )  # fmt: skip
    variant = VariantStatus(
        model="chat", aliases=(), variant="chat@h100-tp4-ep", engine="vllm", pool="h100", ready=1,
        wanted=1, min_replicas=1, max_replicas=1, in_flight=0, queued=0, planned_kv_cache_tokens=1,
        planned_weights_bytes=1, replicas=(replica,), last_event="",
        adapters={"legal": "/lora/legal", "medical": "org/medical", "new": "/lora/new"},
    )  # fmt: skip
    status = FleetStatus(
        fleet="t", table_version=1, variants=(variant,), gateways=("g",), events=()
    )
    console = Console(width=250, record=True, file=io.StringIO())

    console.print(status_page(status))
    page = [" ".join(line.split()) for line in console.export_text().splitlines()]

    assert any("ready, experts 83 % balanced" in line for line in page)
    assert "legal of chat 1/1 loaded /lora/legal" in page
    assert any(line.startswith("medical of chat 0/1 not loaded: LoRA rank 64") for line in page)
    assert "new of chat 0/1 loading /lora/new" in page


@pytest.mark.engine
def test_vllm_understands_the_planned_flags() -> None:
    wish = ExpertBalance(window_size=500, step_interval=900, num_redundant_experts=4)
    shapes = [
        plan.variants[0].shape
        for plan in (a_plan_with(wish), a_plan_with(None, lora=LoraLimits(max_loras=2)))
    ]

    balanced, adapted = (understood(shape.engine_args) for shape in shapes)

    assert balanced["enable_eplb"]
    assert balanced["eplb_config"]["window_size"] == 500
    assert balanced["eplb_config"]["num_redundant_experts"] == 4
    assert balanced["eplb_config"]["log_balancedness_interval"] == 100
    assert [adapted[name] for name in ("enable_lora", "max_loras", "max_cpu_loras")] == [
        True,
        2,
        32,
    ]


UNDERSTOOD = """
import dataclasses, json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
taken = EngineArgs.from_cli_args(parser.parse_args(sys.argv[1:]))
told = {name: getattr(taken, name) for name in ("enable_eplb", "enable_lora", "max_loras")}
told |= {"max_cpu_loras": taken.max_cpu_loras}
print(json.dumps({**told, "eplb_config": dataclasses.asdict(taken.eplb_config)}))
"""


def understood(arguments: tuple[str, ...]) -> dict[str, Any]:
    """What vLLM's own parser makes of them."""
    command = [sys.executable, "-c", UNDERSTOOD, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(result.stdout.splitlines()[-1])
