"""How the cluster part grows with its replicas: `make bench-cluster`.

    python -m tests.multihost.bench [--sizes 50,100,200] [--hosts 12] [--swap-gib 16]

Makes a head and workers on this machine, each with its own network and process table, brings Ray up
on them by `ray up`, and deploys one fleet of ten models with more replicas each time. The way is the
real one: planner, Ray, a Serve replica each, endpoint table, gateways on three hosts; only the
engines are simulated, each inside of its replica's process. Most of what a Python process has loaded
it never looks at again: that waits in swap, on a file that goes with the run. A size for which the
machine still lacks memory is left out, and said so. Needs root.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadtests.processes import CannotRun
from tests.multihost.bench_hosts import BenchHosts, bench_hosts
from tests.multihost.cluster_view import (
    Page,
    busy_cores,
    delays_between,
    free_gib,
    free_memory_gib,
    memory_mib,
    quantile,
)
from tests.multihost.fault_hosts import why_not
from tests.multihost.lab import OPERATOR
from tests.multihost.page_out import page_out, take_what_waits
from tests.multihost.shared_machine import niceness_across_sessions, swap_file

_MODELS = 10
_GATEWAYS = 3
_SPARE_SLOTS = 2  # of each host, beyond what the others need when one is lost
_STEADY_S = 20.0
_UNTOUCHED_GIB = 8.0  # of memory, for what else comes: page tables, stacks, files that are read
_POLL_S = 0.1
_REST = 4.0  # times as long as a look took
_FIRST_GUESS_GIB = 0.12  # a replica, before the first were measured
_MODEL = """
  - name: model-{number}
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
    max_num_seqs: 32
    replicas: {{min: {least}, max: {most}}}
    scaling: {{scale_down_delay_s: 3600}}
    engine_args: [--sim-inside, --sim-speed=10]
"""
_COLUMNS = (
    "replicas", "deploy s", "cores idle", "scaling loop p50/p99 ms", "census p50/p99 ms", "propagation p50/p99 ms",
    "one model up s", "down s", "host loss: given up s", "full s", "controller MiB", "head MiB",
    "a replica MiB",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bench:
    """A running cluster with what is needed to look at it. Use it on the operator's network."""

    hosts: BenchHosts
    folder: Path
    keep_free_gib: float
    patience_s: float

    def pages(self) -> list[Page]:
        """What the gateways tell now."""
        return [Page.of(url) for url in self.hosts.gateways]

    def until(self, what: str, holds: Callable[[], bool]) -> float:
        """Wait for it; seconds that took.

        Raises:
            CannotRun: it did not come about, or the machine ran short of memory.
        """
        begun_s = looked_s = time.perf_counter()
        while not holds():
            now_s = time.perf_counter()
            if free_gib() < self.keep_free_gib:
                raise CannotRun(f"{what}: given up with {free_gib():.1f} GiB of memory left")
            if now_s - begun_s > self.patience_s:
                raise CannotRun(f"{what}: not within {self.patience_s:g} s")
            # Of many replicas each look takes what is looked at some time too.
            time.sleep(max(_POLL_S, _REST * (now_s - looked_s)))
            looked_s = time.perf_counter()
        return time.perf_counter() - begun_s

    def all_serve(self, wanted: int) -> bool:
        """So many replicas are ready, and every gateway routes to as many.

        One more may be there for a while: what takes the place of one that is not where planned.
        """
        if len(self.hosts.replicas()) < wanted:
            return False
        with suppress(OSError):  # a gateway that still starts
            return all(sum(page.ready.values()) >= wanted for page in self.pages())
        return False

    def all_hosts(self) -> None:
        """Wait until Ray runs on all of them."""
        names = {"head", *self.hosts.workers}
        self.until(f"Ray runs on {len(names)} hosts", lambda: self.hosts.nodes() == names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each size. Returns the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    sizes = [int(size) for size in options.sizes.split(",")]
    if reason := why_not():
        _say(f"error: {reason}")
        return 2
    slots = -(-max(sizes) // (options.hosts - 1)) + _SPARE_SLOTS
    _print(" | ".join(["", *_COLUMNS, ""]).strip())
    _print("|" + " ---: |" * len(_COLUMNS))
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bora-bench-", dir="/var/tmp") as folder,
            swap_file(Path(folder) / "swap", options.swap_gib),
            niceness_across_sessions(),
            bench_hosts(options.hosts, slots, _GATEWAYS) as hosts,
        ):
            bench = Bench(hosts, Path(folder), options.keep_free_gib, options.patience_s)
            hosts.lab.inside(OPERATOR, lambda: _measure_all(bench, sizes))
    except CannotRun as error:
        _say(f"error: {error}")
        return 2
    return 0


def _measure_all(bench: Bench, sizes: Sequence[int]) -> None:
    bench.all_hosts()
    _say(f"Ray runs on {len(bench.hosts.workers)} hosts of {bench.hosts.slots} slots and a head")
    _deploy(bench, _MODELS)
    served, each_gib = _MODELS, _FIRST_GUESS_GIB
    for size in sizes:
        _make_room(bench, (size - served) * each_gib)
        left = free_gib() - (size - served) * each_gib
        if left < bench.keep_free_gib:
            _say(
                f"{size} replicas: left out, {left:.1f} GiB of memory would be left for others, "
                f"and --keep-free-gib is {bench.keep_free_gib:g}"
            )
            return
        row, each_mib = _measure(bench, served, size)
        _print("| " + " | ".join(row) + " |")
        served, each_gib = size, each_mib / 1024


def _make_room(bench: Bench, wanted_gib: float) -> None:
    """Put replicas that idle into swap, of which a sixth comes back at once.

    The kernel would do so too, when nothing is left, and hold up everybody who asks for a page.
    """
    wanted_gib += _UNTOUCHED_GIB
    for name in bench.hosts.workers:
        for pid in bench.hosts.pids(name, "ray::ServeReplica"):
            if free_memory_gib() < wanted_gib:
                with suppress(OSError):  # it has ended
                    page_out(pid)
    take_what_waits(min(wanted_gib, free_memory_gib() - bench.keep_free_gib))


def _measure(bench: Bench, served: int, size: int) -> tuple[list[str], float]:
    """A row of the table, and the memory of a replica, MiB."""
    hosts, seen = bench.hosts, [bench.pages()]

    def ended(phase: str) -> None:
        seen.append(bench.pages())
        told = _propagation(seen[-2], seen[-1])
        _say(f"{size} replicas, {phase}; propagation p50/p99 {told} ms")

    deploy_s = _deploy(bench, size)
    ended(f"{size - served} more serve after {deploy_s:.1f} s")
    cores = busy_cores(_STEADY_S)
    up_s, down_s = _scale(bench, size)
    ended(f"one model up in {up_s:.1f} s, down in {down_s:.1f} s")
    lost, away_s, full_s = _lose_a_host(bench, size)
    ended(f"a host with {lost} of them died: away {away_s:.1f} s, full {full_s:.1f} s")
    own = [pid for name in hosts.workers for pid in hosts.pids(name, "ray::ServeReplica")]
    each_mib = memory_mib(own) / max(1, len(own))
    row = [
        f"{size}",
        f"{deploy_s:.1f} (+{size - served})",
        f"{cores:.2f}",
        *_loops(hosts),
        _propagation(seen[0], seen[-1]),
        *(f"{seconds:.1f}" for seconds in (up_s, down_s, away_s, full_s)),
        f"{memory_mib(hosts.pids('head', 'ray::ControllerActor')):.0f}",
        f"{memory_mib(hosts.pids('head')):.0f}",
        f"{each_mib:.0f}",
    ]
    return row, each_mib


def _loops(hosts: BenchHosts) -> list[str]:
    loops = {each.name: each for each in hosts.controller.status().loops}
    return [_milliseconds(loops[name].p50_s, loops[name].p99_s) for name in ("scaling", "census")]


def _propagation(before: Sequence[Page], after: Sequence[Page]) -> str:
    delays = delays_between(before, after)
    return _milliseconds(quantile(delays, 0.5), quantile(delays, 0.99))


def _milliseconds(p50_s: float | None, p99_s: float | None) -> str:
    return " / ".join("-" if each is None else f"{1000 * each:.0f}" for each in (p50_s, p99_s))


def _deploy(bench: Bench, wanted: int) -> float:
    """Seconds from the command until every gateway routes to all."""
    share, rest = divmod(wanted, _MODELS)
    counts = [share + (number < rest) for number in range(_MODELS)]
    models = "".join(
        _MODEL.format(number=number, least=count, most=2 * count)
        for number, count in enumerate(counts)
    )
    begun_s = time.perf_counter()
    log = bench.folder / "deploy.log"
    command = bench.hosts.deploy(models, log)
    try:
        bench.until(f"deploying {wanted} replicas", lambda: command.poll() is not None)
    finally:
        command.kill()
        command.wait()
    if command.returncode != 0:
        raise CannotRun(f"bora deploy: {log.read_text(errors='replace').strip()[-2000:]}")
    bench.until(f"{wanted} replicas serve", lambda: bench.all_serve(wanted))
    return time.perf_counter() - begun_s


def _scale(bench: Bench, size: int) -> tuple[float, float]:
    """Seconds until one model has a replica more, and until it has one less, at all gateways."""
    count, scale = size // _MODELS + (size % _MODELS > 0), bench.hosts.controller.scale

    def served() -> list[int]:
        return [page.ready["model-0"] for page in bench.pages()]

    # One may be there for a while that takes the place of another, which is not where planned.
    bench.until("model-0 has as many as planned", lambda: set(served()) == {count})
    begun_s = time.perf_counter()
    scale("model-0", count + 1)
    bench.until("model-0 has a replica more", lambda: min(served()) > count)
    up_s = time.perf_counter() - begun_s
    begun_s = time.perf_counter()
    scale("model-0", count)
    bench.until("model-0 has a replica less", lambda: max(served()) <= count)
    down_s = time.perf_counter() - begun_s
    bench.until("the replica has gone", lambda: not bench.hosts.replicas("draining"))
    return up_s, down_s


def _lose_a_host(bench: Bench, size: int) -> tuple[int, float, float]:
    """How many replicas died with a host; seconds until no gateway sends anything there, until all
    serve again."""
    name = bench.hosts.workers[-1]
    lost = {each.replica for each in bench.hosts.replicas() if each.node == name}
    if not lost:
        raise CannotRun(f"no replica runs on the host {name}")
    begun_s = time.perf_counter()
    bench.hosts.lab.power_off(name)
    bench.until("the dead host's replicas are away", lambda: _away(bench, lost, size))
    away_s = time.perf_counter() - begun_s
    bench.until("all serve again", lambda: _serve_without(bench, lost, size))
    full_s = time.perf_counter() - begun_s
    bench.hosts.lab.boot(name)
    bench.all_hosts()
    return len(lost), away_s, full_s


def _away(bench: Bench, lost: set[str], size: int) -> bool:
    """Each gateway found them dead, or has a table without them."""
    listed = {each.replica for each in bench.hosts.replicas()}
    if not listed:  # the controller does not answer
        return False
    return all(
        lost <= page.dead()
        or (not lost & listed and sum(page.ready.values()) <= size - len(lost) + 1)
        for page in bench.pages()
    )


def _serve_without(bench: Bench, lost: set[str], size: int) -> bool:
    ready = {each.replica for each in bench.hosts.replicas()}
    return not ready & lost and bench.all_serve(size)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is its output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", default="50,100,200", help="replicas, ascending")
    parser.add_argument("--hosts", type=int, default=12, help="beside the head")
    parser.add_argument("--keep-free-gib", type=float, default=1.0, help="left for others")
    parser.add_argument("--swap-gib", type=float, default=16.0, help="made for the run; 0: none")
    parser.add_argument("--patience-s", type=float, default=900.0, help="for each step")
    return parser


if __name__ == "__main__":
    sys.exit(main())
