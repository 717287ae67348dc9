"""How long the planner takes, how near to the best it comes, and in how much memory.

python -m loadtests.bench_planner [--largest 10000] [--objectives cost,throughput,headroom]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from random import Random
from typing import Any

from placement.catalogue import load_catalogue
from placement.fleet import Demand, FleetModel, FleetSpec, Objective, ReplicaBounds, TokenLengths
from placement.inventory import Inventory, Pool
from placement.planner import make_plan

GPU_TYPES = ("H100-SXM", "A100-80-SXM", "RTX-4090", "L40S", "H200-SXM", "L4")
SIZES = ((8, 1), (64, 3), (250, 5), (1_000, 10), (2_500, 15), (5_000, 20), (10_000, 30))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each size."""
    options = _parser().parse_args(arguments)
    _say(
        f"{'GPUs':>6} {'models':>6} {'objective':>10} {'seconds':>8} {'CPU s':>6} {'gap':>8} "
        f"{'status':>10} {'used':>6} {'MiB':>6}"
    )
    context = multiprocessing.get_context("spawn")
    for gpus, models in SIZES:
        if gpus > options.largest:
            break
        with context.Pool(1) as pool:  # a process of its own, so that memory is told apart
            demand = pool.apply(a_demand, (gpus, models, options.load))
        for objective in options.objectives.split(","):
            with context.Pool(1) as pool:
                _say(pool.apply(measure, (gpus, models, demand, objective)))
    return 0


def a_demand(gpus: int, models: int, load: float) -> float:
    """What the models need for about this share of the GPUs to be used at least cost."""
    inventory, catalogue = an_inventory(gpus), load_catalogue()
    demand, fitting = load, load
    for _ in range(8):
        plan = make_plan(a_fleet(models, gpus, demand), inventory, catalogue)
        share = plan.gpus_used / plan.gpus_total
        if not plan.unmet:
            fitting = demand
            if share > 0.8 * load:
                break
        demand *= 0.7 if plan.unmet else min(2.0, load / share)
    return fitting


def measure(gpus: int, models: int, demand: float, objective: str) -> str:
    """Plan one fleet; the line of the table."""
    inventory, catalogue = an_inventory(gpus), load_catalogue()
    fleet = a_fleet(models, gpus, demand, objective)
    started, started_cpu = time.perf_counter(), time.process_time()
    plan = make_plan(fleet, inventory, catalogue)
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{plan.gpus_total:>6} {models:>6} {objective:>10} {seconds:>8.2f} {cpu:>6.2f} {100 * plan.gap:>7.3f}% "
        f"{plan.status:>10} {plan.gpus_used:>6} {memory:>6.0f}"
    )


def an_inventory(gpus: int) -> Inventory:
    """Nodes of eight GPUs, of six types in equal parts."""
    nodes = gpus // 8
    types = GPU_TYPES[: max(1, min(len(GPU_TYPES), nodes))]
    share = [nodes // len(types) + (index < nodes % len(types)) for index in range(len(types))]
    return Inventory(
        pools=tuple(
            Pool(name=gpu.lower(), gpu=gpu, nodes=count, gpus_per_node=8)
            for gpu, count in zip(types, share, strict=True)
        )
    )


def a_fleet(models: int, gpus: int, load: float, objective: Any = "cost") -> FleetSpec:
    """Models of the catalogue with demands in proportion to `load`."""
    random = Random(models)  # noqa: S311 - not a secret
    names = [
        name
        for name in load_catalogue().models
        if not name.startswith(("nano-", "mistral-large-4")) and "eagle" not in name
    ]
    wishes = [
        FleetModel(
            name=f"model-{index}",
            model=names[index * 7 % len(names)],
            max_model_len=8192,
            demand=Demand(
                requests_per_s=load * gpus / models * random.uniform(0.05, 0.6),
                input_tokens=TokenLengths(mean=random.randint(200, 1500)),
                output_tokens=TokenLengths(mean=random.randint(50, 400)),
            ),
            slo=Objective(ttft_p95_s=3.0, tpot_p95_ms=random.choice([80, 100, 150])),
            replicas=ReplicaBounds(min=1, max=2 * gpus),
        )
        for index in range(models)
    ]
    return FleetSpec(fleet="bench", models=tuple(wishes), objective=objective)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=10_000, help="GPUs")
    parser.add_argument("--load", type=float, default=0.7, help="share of the GPUs that is used")
    parser.add_argument("--objectives", default="cost,throughput", help="and headroom")
    return parser


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
