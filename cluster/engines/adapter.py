"""The seam between replicas and engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from placement.plan import Variant
from placement.speed_window import EngineCounters

SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
SIDE_CHANNEL_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
MEETING = "meeting the other ranks"  # the stage of a rank that waits for those of other nodes


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start: `command`, and what to add to the environment."""

    command: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Rank:
    """One node of a gang: an engine with ranks on several nodes, a process tree on each.

    The node with rank 0 leads: it serves requests, and the others meet it at its `master` address.
    """

    node_rank: int
    num_nodes: int
    master_host: str
    master_port: int
    host: str  # this node's own address
    interface: str  # that has it
    rpc_port: int = 0  # where data-parallel copies of other nodes register with the leader


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """An engine's own metrics, now."""

    running: int
    waiting: int
    kv_cache_usage: float  # 0..1
    kv_cache_tokens: int | None = None  # held now, of an engine that tells no share
    counters: EngineCounters | None = field(default=None, compare=False)  # None: it does not tell
    # The newest task of each slot, of an engine that counts no answers but their tokens.
    tasks: frozenset[tuple[int, int]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of itself while it starts; None: it has not said (yet)."""

    kv_cache_tokens: int | None = None
    weights_bytes: int | None = None  # of one rank

    def with_copies(self, others: Iterable[EngineFacts]) -> EngineFacts:
        """Of all data-parallel copies: tokens add up, and the heaviest rank's weights count."""
        shares = (self, *others)
        tokens = [each.kv_cache_tokens for each in shares if each.kv_cache_tokens is not None]
        weights = [each.weights_bytes for each in shares if each.weights_bytes is not None]
        return EngineFacts(sum(tokens) if tokens else None, max(weights, default=None))


def num_ports(variant: Variant) -> int:
    """How many ports in a row an engine takes: its server's, and those of its side channel.

    A side channel is where engines that hand KV caches on meet, one for each data-parallel rank.
    """
    return 1 if variant.role == "whole" else 1 + variant.shape.data_parallel_size


def side_channel(variant: Variant, host: str, port: int) -> dict[str, str]:
    """The environment that tells an engine, whose server listens on `port`, of its side channel."""
    if variant.role == "whole":
        return {}
    return {SIDE_CHANNEL_HOST: host, SIDE_CHANNEL_PORT: str(port + 1)}


class Engine(Protocol):
    """One per engine kind; stateless."""

    @property
    def load_paths(self) -> tuple[str, ...]:
        """Paths of the pages that `load` reads."""
        ...

    def launch(
        self, variant: Variant, *, checkpoint: Path | str, host: str, port: int, api_key: str
    ) -> Launch:
        """Command and environment that serve `variant` on `host:port` under the name `variant.model`.

        The ports after it, `num_ports` in all, are its own too. `checkpoint` is a local folder or file, or a Hugging Face repo id.
        """
        ...

    def ranked(self, launch: Launch, rank: Rank) -> Launch:
        """`launch`, made to run that node's share of a gang.

        Raises:
            EngineFailed: such an engine cannot be spread over nodes.
        """
        ...

    def stage(self, log_line: str) -> str | None:
        """What the engine is doing (`loading weights`, ...), if this line of its log tells."""
        ...

    def facts(self, log: str) -> EngineFacts:
        """What the log tells about memory."""
        ...

    def load(self, *pages: str) -> EngineLoad:
        """Parse the text of the pages at `load_paths`, in their order."""
        ...

    def expert_balance(self, log: str) -> float | None:
        """Mean load of ranks over the largest, 0..1, if these lines of the log tell (EPLB)."""
        ...
