"""`python -m cluster.host_report`: this host as JSON, for one who asks over ssh."""

from __future__ import annotations

import argparse
import sys
import time

from cluster.host_state import HostState, host_state
from cluster.probes.host import cache_folder
from cluster.probes.node import probe
from placement.node_facts import NodeFacts
from placement.spec import Spec


class HostReport(Spec):
    """What is printed."""

    facts: NodeFacts
    state: HostState
    now_s: float  # epoch seconds, as late as possible


def main() -> int:
    """Print the report; the exit status."""
    parser = argparse.ArgumentParser(prog="host_report")
    parser.add_argument("--quick", action="store_true", help="measure nothing")
    parser.add_argument("--ports", default="", help="that should be free, with commas")
    options = parser.parse_args()
    report = host_report(
        measure=not options.quick, ports=[int(port) for port in options.ports.split(",") if port]
    )
    late = report.model_copy(update={"now_s": time.time()})
    print(late.model_dump_json())  # noqa: T201 - its answer
    return 0


def host_report(*, measure: bool, ports: list[int]) -> HostReport:
    """Of this host."""
    facts = probe(measure=measure, progress=lambda text: print(text, file=sys.stderr))  # noqa: T201
    state = host_state(ports, cache_folder())
    return HostReport(facts=facts, state=state, now_s=time.time())


if __name__ == "__main__":
    sys.exit(main())
