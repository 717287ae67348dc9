"""A node's share of a simulated engine that spans several nodes.

    python -m cluster.engines.sim_gang --node-rank R --num-nodes N --master-addr A --master-port P -- ...

As vLLM does, all ranks wait until they have met at the leader's address; then the leader serves (the
flags after `--` are the server's), the others do nothing but live, and nobody notices who dies. Each
node tells of its own data-parallel copies.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence

from cluster.engines import sim_server
from cluster.engines.sim_options import parse_options

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Meet the others, then serve or wait."""
    parser = argparse.ArgumentParser(prog="python -m cluster.engines.sim_gang")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--num-nodes", type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument("server", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s"
    )
    master = (options.master_addr, options.master_port)
    # As vLLM writes it, so that one parser reads both.
    logger.info("rank=%d distributed_init_method=tcp://%s:%d", options.node_rank, *master)
    flags = options.server[1:]
    copies = parse_options(flags).data_parallel_size
    flags += ["--data-parallel-size-local", str(max(1, copies // options.num_nodes))]
    if options.node_rank == 0:
        _gather(master, options.num_nodes - 1)
        sim_server.main(flags)
        return
    _join(master)
    logger.info("Starting to load model (simulated)")
    first, behind = divmod(options.node_rank * copies, options.num_nodes)
    if copies > 1 and not behind:  # else it has the rest of a copy that another node leads
        sim_server.tell_memory(parse_options(flags), first)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


def _gather(master: tuple[str, int], followers: int) -> None:
    with socket.create_server(master) as server:
        for _ in range(followers):
            server.accept()[0].close()


def _join(master: tuple[str, int]) -> None:
    while True:
        try:
            socket.create_connection(master, timeout=5).close()
        except OSError:
            time.sleep(0.1)
        else:
            return


if __name__ == "__main__":
    main()
