"""What data-parallel copies need so that each one's tokens reach the experts of all: flags, buffers.

vLLM's `allgather_reducescatter` needs no package beside vLLM: before the experts of a layer every
rank gathers the tokens of all copies, after them their sums are scattered again. Kernels that send
a token only where its experts are (DeepEP and others) are a matter of `engine_args` and of packages
on the nodes; memory and speed are planned without them.
"""

from __future__ import annotations

from placement.candidate import Candidate
from placement.pipeline import Stage

BACKEND = "allgather_reducescatter"
GATHERED_TOKENS = 16384  # that a step of all copies may have: every rank has buffers for them


def batched_tokens(copies: int, usual: int) -> int:
    """Tokens of a step of each copy, where one engine alone would take `usual`."""
    return usual if copies == 1 else max(1, min(usual, GATHERED_TOKENS // copies))


def exchange_args(candidate: Candidate) -> tuple[str, ...]:
    """VLLM's flags: how many copies, how many of them on a node, how they exchange tokens.

    A copy that is larger than a node counts as one on each of its nodes.
    """
    copies, nodes = candidate.data_parallel_size, candidate.num_nodes
    if copies == 1:
        return ()
    local = ("--data-parallel-size-local", str(max(1, copies // nodes))) if nodes > 1 else ()
    return ("--data-parallel-size", str(copies), *local, "--all2all-backend", BACKEND)


def exchange_bytes(candidate: Candidate, stage: Stage) -> int:
    """Buffers of a rank of `stage` for the tokens of all copies, which a profile run fills.

    Gathered and summed hidden states, and the experts' workspaces: for each token and each expert
    that it chose, the wider of hidden and intermediate states before and after the activation
    (TritonExperts.workspace_shapes; modular_kernel.py cuts nothing into chunks).
    """
    moe, copies = candidate.architecture.moe, candidate.data_parallel_size
    if moe is None or copies == 1 or candidate.device.is_cpu:
        return 0
    if stage.first_layer + stage.num_layers <= moe.num_dense_layers:
        return 0
    hidden, inner = candidate.architecture.hidden_size, moe.expert_intermediate_size
    if not candidate.expert_parallel:
        inner //= copies * candidate.tensor_parallel_size
    workspace = moe.num_experts_per_token * (max(inner, hidden) + max(2 * inner, hidden))
    tokens = copies * candidate.max_num_batched_tokens
    return tokens * (workspace + 2 * hidden) * candidate.element_bytes
