"""How the cluster part grows with its replicas: `make bench-cluster`.

    python -m loadtests.bench_cluster [--sizes 50,100,200] [--nodes 12] [--keep-free-gib 8]

Starts Ray nodes on this machine (a head and workers) and one fleet of ten models, which it deploys
with more replicas each time. The way is the real one: planner, Ray, a Serve replica each, endpoint
table, three gateways; only the engines are simulated, each inside of its replica's process. A size
for which the machine lacks memory is left out, and said so.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.cluster_view import (
    Controller,
    Page,
    delays_between,
    free_gib,
    memory_mib,
    quantile,
    replicas,
)
from loadtests.drill_cluster_processes import DrillCluster, drill_cluster
from loadtests.drill_processes import free_ports
from loadtests.processes import CannotRun

_MODELS = 10
_MORE_GATEWAYS = 2  # beside the one that `bora deploy` starts
_SPARE_SLOTS = 2  # of each node, beyond what the others need when one is lost
_STEADY_S = 10.0
_POLL_S = 0.1
_FIRST_GUESS_GIB = 0.12  # a replica, before the first were measured
# Processes start slowly where hundreds share two cores: a node that answers late is not dead.
_PATIENCE = {"RAY_health_check_timeout_ms": "20000", "RAY_enable_worker_prestart": "0",
             "RAY_prestart_worker_first_driver": "0"}  # fmt: skip
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
    "replicas", "deploy s", "scaling loop p50/p99 ms", "census p50/p99 ms", "propagation p50/p99 ms",
    "one model up s", "down s", "node loss: away s", "full s", "controller MiB", "head MiB",
    "a replica MiB",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bench:
    """A running cluster with what is needed to look at it."""

    cluster: DrillCluster
    folder: Path
    ports: tuple[int, int]
    nodes: tuple[str, ...]
    gateways: list[str]
    keep_free_gib: float
    patience_s: float

    @property
    def controller(self) -> Controller:
        """Of what was deployed last."""
        return Controller.of(Path(self.cluster.env["BORA_STATE"]))

    def pages(self) -> list[Page]:
        """What the gateways tell now."""
        return [Page.of(url) for url in self.gateways]

    def until(self, what: str, holds: Callable[[], bool]) -> float:
        """Wait for it; seconds that took.

        Raises:
            CannotRun: it did not come about, or the machine ran short of memory.
        """
        begun_s = time.perf_counter()
        while not holds():
            if free_gib() < self.keep_free_gib:
                raise CannotRun(f"{what}: given up with {free_gib():.1f} GiB of memory left")
            if time.perf_counter() - begun_s > self.patience_s:
                raise CannotRun(f"{what}: not within {self.patience_s:g} s")
            time.sleep(_POLL_S)
        return time.perf_counter() - begun_s

    def all_serve(self, wanted: int) -> bool:
        """So many replicas are ready, and every gateway routes to as many."""
        ready = len(replicas(self.controller.status()))
        return ready == wanted and all(sum(p.ready.values()) == wanted for p in self.pages())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each size. Returns the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    sizes = [int(size) for size in options.sizes.split(",")]
    _print(" | ".join(["", *_COLUMNS, ""]).strip())
    _print("|" + " ---: |" * len(_COLUMNS))
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bora-bench-") as folder,
            _running(Path(folder), options, max(sizes)) as bench,
        ):
            _measure_all(bench, sizes)
    except CannotRun as error:
        _say(f"error: {error}")
        return 2
    return 0


@contextmanager
def _running(folder: Path, options: argparse.Namespace, most: int) -> Iterator[Bench]:
    nodes = tuple(f"n{number}" for number in range(options.nodes))
    slots = -(-most // (len(nodes) - 1)) + _SPARE_SLOTS
    http, grpc = free_ports(2)
    with drill_cluster(folder, workers=nodes, slots=slots, env=_PATIENCE) as cluster:
        _say(f"Ray runs on {len(nodes)} nodes of {slots} slots and a head")
        bench = Bench(
            cluster=cluster,
            folder=folder,
            ports=(http, grpc),
            nodes=nodes,
            gateways=[f"http://127.0.0.1:{http}"],
            keep_free_gib=options.keep_free_gib,
            patience_s=options.patience_s,
        )
        with ExitStack() as stack:
            _deploy(bench, _MODELS)
            for number in range(_MORE_GATEWAYS):
                bench.gateways.append(stack.enter_context(_gateway(bench, number)))
            bench.until("all gateways have a table", lambda: _listens(bench, _MODELS))
            yield bench


def _listens(bench: Bench, wanted: int) -> bool:
    try:
        return bench.all_serve(wanted)
    except OSError:  # a gateway that still starts
        return False


def _measure_all(bench: Bench, sizes: Sequence[int]) -> None:
    served, each_gib = _MODELS, _FIRST_GUESS_GIB
    for size in sizes:
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


def _measure(bench: Bench, served: int, size: int) -> tuple[list[str], float]:
    before = bench.pages()
    deploy_s = _deploy(bench, size)
    _say(f"{size} replicas serve, {size - served} more after {deploy_s:.1f} s")
    time.sleep(_STEADY_S)
    up_s, down_s = _scale(bench, size)
    away_s, full_s = _lose_a_node(bench, size)
    loops = {each["name"]: each for each in bench.controller.status()["loops"]}
    delays = delays_between(before, bench.pages())
    own = [each["pid"] for each in replicas(bench.controller.status())]
    each_mib = memory_mib(own) / max(1, len(own))
    controller = bench.cluster.pid_of("ControllerActor")
    row = [
        str(size),
        f"{deploy_s:.1f} (+{size - served})",
        _milliseconds(loops["scaling"]["p50_s"], loops["scaling"]["p99_s"]),
        _milliseconds(loops["census"]["p50_s"], loops["census"]["p99_s"]),
        _milliseconds(quantile(delays, 0.5), quantile(delays, 0.99)),
        f"{up_s:.1f}",
        f"{down_s:.1f}",
        f"{away_s:.1f}",
        f"{full_s:.1f}",
        f"{memory_mib([controller]):.0f}",
        f"{memory_mib(bench.cluster.pids('head')):.0f}",
        f"{each_mib:.0f}",
    ]
    return row, each_mib


def _milliseconds(p50_s: float | None, p99_s: float | None) -> str:
    return " / ".join("-" if each is None else f"{1000 * each:.0f}" for each in (p50_s, p99_s))


def _deploy(bench: Bench, wanted: int) -> float:
    """Seconds from the command until every gateway routes to all."""
    share, rest = divmod(wanted, _MODELS)
    counts = [share + (number < rest) for number in range(_MODELS)]
    text = "".join(
        _MODEL.format(number=number, least=count, most=2 * count)
        for number, count in enumerate(counts)
    )
    http, grpc = bench.ports
    gateway = f"gateway: {{http_port: {http}, grpc_port: {grpc}}}\n"
    fleet = bench.folder / "fleet.yaml"
    fleet.write_text(f"fleet: bench\nmodels:{text}{gateway}")
    begun_s = time.perf_counter()
    with _command(bench, "deploy", str(fleet), "--address", bench.cluster.address) as command:
        bench.until(f"deploying {wanted} replicas", lambda: _ended(command))
    bench.until(f"{wanted} replicas serve", lambda: bench.all_serve(wanted))
    return time.perf_counter() - begun_s


@contextmanager
def _command(bench: Bench, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with (bench.folder / "bora.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", *arguments],
            env=bench.cluster.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()
    if process.returncode not in (0, -signal.SIGTERM):
        said = (bench.folder / "bora.log").read_text(errors="replace")
        raise CannotRun(f"bora {arguments[0]}: {said.strip()[-2000:]}")


def _ended(command: subprocess.Popen[bytes]) -> bool:
    return command.poll() is not None


@contextmanager
def _gateway(bench: Bench, number: int) -> Iterator[str]:
    """One more gateway of the same controller; its address."""
    [port] = free_ports(1)
    token = bench.folder / "gateway.token"
    token.write_text(bench.controller.token)
    token.chmod(0o600)
    command = [sys.executable, "-m", "gateway", "--controller", bench.controller.url, "--no-grpc"]
    command += ["--token-file", str(token), "--http-port", str(port), "--no-access-log"]
    with (bench.folder / f"gateway-{number}.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _scale(bench: Bench, size: int) -> tuple[float, float]:
    """Seconds until one model has a replica more, and until it has one less, at all gateways."""
    count = bench.pages()[0].ready["model-0"]
    took = []
    for wanted in (count + 1, count):
        begun_s = time.perf_counter()
        bench.controller.scale("model-0", wanted)
        bench.until(
            f"model-0 has {wanted} replicas",
            lambda wanted=wanted: all(p.ready["model-0"] == wanted for p in bench.pages()),  # type: ignore[misc]
        )
        took.append(time.perf_counter() - begun_s)
    bench.until("the replica has gone", lambda: bench.all_serve(size))
    return took[0], took[1]


def _lose_a_node(bench: Bench, size: int) -> tuple[float, float]:
    """Seconds until no gateway sends anything to a node that died, and until all serve again."""
    name = bench.nodes[-1]
    there = set(bench.cluster.pids(name))
    status = replicas(bench.controller.status())
    lost = {each["replica"] for each in status if each["pid"] in there}
    if not lost:
        raise CannotRun(f"no replica runs on the node {name}")
    begun_s = time.perf_counter()
    bench.cluster.kill_node(name)
    bench.until("the dead node's replicas are away", lambda: _away(bench, lost, size))
    away_s = time.perf_counter() - begun_s
    bench.until("all serve again", lambda: _serve_without(bench, lost, size))
    full_s = time.perf_counter() - begun_s
    bench.cluster.start_worker(name)
    _say(f"a node with {len(lost)} replicas died: away {away_s:.1f} s, full {full_s:.1f} s")
    return away_s, full_s


def _away(bench: Bench, lost: set[str], size: int) -> bool:
    """Each gateway found them dead, or has a table without them."""
    listed = {each["replica"] for each in replicas(bench.controller.status())}
    return all(
        lost <= page.dead() or (not lost & listed and sum(page.ready.values()) <= size - len(lost))
        for page in bench.pages()
    )


def _serve_without(bench: Bench, lost: set[str], size: int) -> bool:
    ready = {each["replica"] for each in replicas(bench.controller.status())}
    return not ready & lost and bench.all_serve(size)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is its output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", default="50,100,200", help="replicas, ascending")
    parser.add_argument("--nodes", type=int, default=12, help="Ray nodes beside the head")
    parser.add_argument("--keep-free-gib", type=float, default=8.0, help="memory left for others")
    parser.add_argument("--patience-s", type=float, default=900.0, help="for each step")
    return parser


if __name__ == "__main__":
    sys.exit(main())
