"""The whole fault table, for `make drill-cluster`: deaths on this machine, then of hosts and cables.

    python -m tests.multihost.drill [--only engine-kill,head] [--clients 12]

The second part wants root; without it the table says what was left out. Ends with status 1 if a row
misses its limits.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loadtests.drill_cluster import DEATHS, drill, engine_start_s, parser, say
from loadtests.fault_table import HEADER, Row
from loadtests.processes import CannotRun
from tests.multihost.fault_hosts import fault_hosts, why_not
from tests.multihost.host_deaths import HOST_DEATHS, HostDeath, measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both parts and print the table. Returns the exit status."""
    names = [death.name for death in (*DEATHS, *HOST_DEATHS)]
    options = parser(__doc__ or "", names).parse_args(arguments)
    deaths = [death for death in HOST_DEATHS if death.name in options.only]
    reason = why_not() if deaths else ""
    try:
        rows = drill(options.only, options.clients)
        rows += [] if reason else _on_hosts(deaths, options.clients)
    except CannotRun as error:
        say(f"error: {error}")
        return 2
    lines = [HEADER, *(row.line() for row in rows)]
    if reason:
        lines.append(f"\nleft out: {', '.join(death.name for death in deaths)}: {reason}")
    print("\n".join(lines))  # noqa: T201 - this is its output
    return 0 if all(row.holds for row in rows) else 1


def _on_hosts(deaths: Sequence[HostDeath], clients: int) -> list[Row]:
    if not deaths:
        return []
    rows = []
    with fault_hosts() as hosts, tempfile.TemporaryDirectory(prefix="bora-drill-") as folder:
        for death in deaths:
            start_s = asyncio.run(engine_start_s(Path(folder)))
            say(f"{death.name} ... (an engine alone starts within {start_s:.1f} s now)")
            row = measured(death, hosts, clients, start_s)
            say("\n    ".join(filter(None, (row.line(), row.example, row.wrong))))
            rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
