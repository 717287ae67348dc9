"""The planner against what is done without one: on the example fleets, and on a trace of GPU pods.

    python -m loadtests.bench_placement [--pods pods.csv --nodes nodes.csv.gz]

`--pods` has the columns num_gpu, gpu_milli, gpu_spec (types joined by |) in order of arrival, and
`--nodes` gpu, model: Alibaba's openb traces of 2023 (a Parquet file becomes CSV by
`pyarrow.csv.write_csv(pyarrow.parquet.read_table(path), "pods.csv")`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests.by_hand import ByHand, first_fit, own_nodes, own_pools
from loadtests.gpu_pods import RULES, Pods, all_at_once, one_by_one, read_pods
from placement.catalogue import CONFIGS, load_catalogue
from placement.fleet_file import load_fleet
from placement.inventory import Inventory
from placement.planner import make_plan
from placement.spec import load_yaml

_SUFFIX = ".inventory.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    options = _parser().parse_args(arguments)
    _compare_fleets()
    if options.pods is not None and options.nodes is not None:
        _compare_pods(read_pods(options.pods, options.nodes))
    return 0


def _compare_fleets() -> None:
    catalogue = load_catalogue()
    _say("cost per hour of plans that carry the demand (ratio to bora's)")
    _say(
        f"{'fleet':<16}{'bora':>8}  {'first fit':>24}  {'a pool a model':>18}  {'nodes of its own':>18}"
    )
    for path in sorted((CONFIGS / "fleets").glob(f"*{_SUFFIX}")):
        fleet = load_fleet(path.with_name(path.name.replace(_SUFFIX, ".yaml")))
        inventory = load_yaml(path, Inventory)
        cost = make_plan(fleet, inventory, catalogue).cost_per_hour
        others = [way(fleet, inventory, catalogue) for way in (first_fit, own_pools, own_nodes)]
        first, pool, nodes = (_told(other, cost) for other in others)
        _say(f"{fleet.fleet:<16}{cost:>8.2f}  {first:>24}  {pool:>18}  {nodes:>18}")


def _told(plan: ByHand | None, cost: float) -> str:
    if plan is None:
        return "impossible"
    if plan.short:
        return f"{plan.cost_per_hour:.2f}, {len(plan.short)} short"
    return f"{plan.cost_per_hour:.2f} ({plan.cost_per_hour / cost:.2f})"


def _compare_pods(pods: Pods) -> None:
    _say(f"\npods that ask for {pods.asked:.0f} GPUs on {pods.gpus}: share of the GPUs given out")
    for name, rule in RULES.items():
        given, refused = one_by_one(pods, rule)
        _say(f"{name:>12} {100 * given / pods.gpus:7.2f} %, {refused} pods refused")
    given, bound, seconds = all_at_once(pods)
    _say(
        f"{'bora':>12} {100 * given / pods.gpus:7.2f} %, at most {100 * bound / pods.gpus:.2f} %, "
        f"{seconds:.2f} s in the solver"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=Path, help="CSV")
    parser.add_argument("--nodes", type=Path, help="CSV, may be gzipped")
    return parser


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
