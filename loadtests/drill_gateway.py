"""Engines fail in every way, and no stream may show it: `make drill-gateway`.

    python -m loadtests.drill_gateway [--quick] [--only kill,slow] [--engine vllm]

Each scenario starts engines and bora's gateway as processes, asks many streamed questions while
engines are killed, frozen or made to misbehave, and compares every answer with the one that an
undisturbed engine gave: text, finish_reason, usage, token ids, and the form of the stream. Ends with
status 1 if a single stream differs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loadtests.drill_engines import EngineKind, nano_checkpoint
from loadtests.drill_scenarios import SCENARIOS, Row, Scale, Scenario, Setup, run
from loadtests.processes import CannotRun

_HEADER = (
    "| scenario | requests | failed | duplicated tokens | missing tokens | migrations "
    "| p50 TTFT ms | p99 TTFT ms | longest gap s | notes |"
)
# Published for the same drill (8 clients x 100 requests, a decode worker killed).
_PUBLISHED = (
    "| NVIDIA Dynamo, 4 replicas, published | 800 | 4 | ? | ? | ? | ? | ? | ? | 45 s to recover |",
    "| NVIDIA Dynamo, 1 replica, published | 800 | 280 | ? | ? | ? | ? | ? | ? | 38 s to recover |",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scenarios and print the table. Returns the exit status."""
    options = _parser().parse_args(arguments)
    scale = Scale.quick() if options.quick else Scale()
    chosen = _chosen(options.only, quick=options.quick)
    extra = tuple(options.gateway_options.split())
    try:
        kind = EngineKind(tpot_ms=scale.tpot_ms)
        if options.engine == "vllm":
            kind = EngineKind(options.checkpoint or nano_checkpoint())
        with tempfile.TemporaryDirectory() as folder:
            setup = Setup(kind, scale, options.engines, extra, Path(folder))
            rows = asyncio.run(_run(chosen, setup))
    except CannotRun as error:
        _say(f"error: {error}")
        return 2
    print(table(rows))  # noqa: T201 - this is its output
    return 0 if rows and all(row.passed for row in rows) else 1


async def _run(chosen: Sequence[Scenario], setup: Setup) -> list[Row]:
    rows = []
    for scenario in chosen:
        if scenario.needs_simulated and not setup.kind.simulated:
            _say(f"{scenario.name}: left out, only simulated engines fail so")
            continue
        _say(f"{scenario.name} ...")
        row = await run(scenario, setup)
        _say(row.line())
        for problem in row.examples:
            _say(f"    {problem}")
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The report in Markdown, the published figures of another system below ours."""
    lines = [
        _HEADER,
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        *(row.line() for row in rows),
        *_PUBLISHED,
    ]
    failed = [row.name for row in rows if not row.passed]
    lines.append(f"\n{len(rows) - len(failed)} of {len(rows)} rows hold")
    if failed:
        lines.append(f"missed: {', '.join(failed)}")
    return "\n".join(lines)


def _chosen(only: str | None, *, quick: bool) -> list[Scenario]:
    known = {scenario.name: scenario for scenario in SCENARIOS}
    names = (
        only.split(",") if only else [name for name, one in known.items() if one.quick or not quick]
    )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[name] for name in names]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter, for CI")
    parser.add_argument("--only", help=f"of {', '.join(one.name for one in SCENARIOS)}")
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--engines", type=int, default=4, help="replicas, where a row does not say")
    parser.add_argument("--checkpoint", type=Path, help="for --engine vllm; else nano-mixtral")
    parser.add_argument("--gateway-options", default="", help="more options of the gateway")
    return parser


if __name__ == "__main__":
    sys.exit(main())
