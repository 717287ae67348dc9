"""vLLM over several nodes: each node starts its share, with the same flags and its own rank.

Ranks are pinned: node r has the ranks r x n to (r + 1) x n - 1 of n a node, in the order (copy x
stages + stage) x tensor parallel size + position, so that tensor parallel groups stay inside nodes.
Of data-parallel copies each is an engine core of its own, on its first node; the leader's server
shares requests out among all. The leader alone answers requests; followers run headless. Of a
pipeline neither notices when the other dies: the leader stays healthy until a request needs the
dead rank (run, 0.32).
"""

from __future__ import annotations

import os

from cluster.engines.adapter import Launch, Rank

SERVER = "vllm.entrypoints.openai.api_server"  # takes no --headless
FOLLOWER = "cluster.engines.vllm_follower"


def ranked(launch: Launch, rank: Rank) -> Launch:
    """The launch of a node's share; the shape's own flags have `--nnodes`."""
    command = [*launch.command, "--node-rank", str(rank.node_rank)]
    command += ["--master-addr", rank.master_host, "--master-port", str(rank.master_port)]
    if "--data-parallel-size" in command:
        # Else it is 29550 for every engine of a node.
        command += ["--data-parallel-address", rank.master_host]
        command += ["--data-parallel-rpc-port", str(rank.rpc_port)]
    if rank.node_rank > 0:
        command[command.index(SERVER)] = FOLLOWER
        command.append("--headless")
    return Launch(tuple(command), {**launch.env, **_network(rank)})


def _network(rank: Rank) -> dict[str, str]:
    """By which interface ranks talk: left alone, libraries guess, and may take one without a way.

    What the operator has set on the node stays. NCCL takes a name as a prefix unless `=` precedes.
    """
    wanted = {
        "NCCL_SOCKET_IFNAME": f"={rank.interface}",
        "GLOO_SOCKET_IFNAME": rank.interface,
        "VLLM_HOST_IP": rank.host,
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}
