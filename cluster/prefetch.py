"""Prefetch: the weights of what comes are on a node before what serves there goes. No Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from cluster.checkpoints import to_download
from cluster.errors import ClusterError
from cluster.event_log import EventLog
from cluster.generations import GenerationKey, key_of
from placement.plan import Variant

RETRY_S = (30.0, 600.0)  # a hub that does not answer comes back, a disk is cleared


class NodeFetch(Protocol):
    """Brings weights to a node."""

    async def __call__(self, variant: Variant, node_id: str, tell: Callable[[str], None]) -> None:
        """Return when they are there; `tell` is given how far it is.

        Raises:
            ClusterError: they cannot be had, or the node is gone.
        """
        ...


@dataclass(slots=True)
class _Fetch:
    """One generation's weights on their way to one node."""

    node: str
    task: asyncio.Task[None] | None = None
    stage: str = ""
    failure: str = ""
    done: bool = False
    attempts: int = 0
    again_s: float = 0.0  # when (monotonic) one that failed is tried again

    def note(self, stage: str) -> None:
        self.stage = stage


class Prefetch:
    """Downloads ahead of roll-outs, by generation and node. What happens is told to `events`.

    `retry_s`: first and longest pause after a failure.
    """

    def __init__(
        self, fetch: NodeFetch, events: EventLog, retry_s: tuple[float, float] = RETRY_S
    ) -> None:
        self._retry_s = retry_s
        self._fetch = fetch
        self._events = events
        self._fetches: dict[tuple[GenerationKey, str], _Fetch] = {}

    def want(self, variants: Iterable[Variant], nodes: Iterable[tuple[str, str, str]]) -> bool:
        """Have the weights of `variants` on `nodes` (id, name, pool); True once they are there.

        Only on nodes of a variant's own pool. The first call begins; later ones ask.
        """
        nodes, variants = tuple(nodes), tuple(variants)
        self._forget_others(variants, {node_id for node_id, _, _ in nodes})
        wanted = [
            self._begun(variant, node_id, name)
            for variant in variants
            if to_download(variant) is not None
            for node_id, name, pool in nodes
            if pool == variant.pool
        ]
        return all(fetch.done for fetch in wanted)

    def _begun(self, variant: Variant, node_id: str, name: str) -> _Fetch:
        key = (key_of(variant), node_id)
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = self._fetches[key] = _Fetch(name)
        again = bool(fetch.failure) and time.monotonic() >= fetch.again_s
        if fetch.task is None or again:
            fetch.task = asyncio.create_task(self._run(variant, node_id, fetch))
        return fetch

    async def _run(self, variant: Variant, node_id: str, fetch: _Fetch) -> None:
        begun_s = time.monotonic()
        fetch.attempts += 1
        self._note(variant, fetch, f"fetching the next weights to {fetch.node}")
        try:
            await self._fetch(variant, node_id, fetch.note)
        except ClusterError as error:
            first, longest = self._retry_s
            pause_s = min(first * 2 ** (fetch.attempts - 1), longest)
            fetch.again_s, fetch.failure = time.monotonic() + pause_s, str(error)
            self._note(variant, fetch, f"fetching to {fetch.node} failed", reason=fetch.failure)
            return
        fetch.done, fetch.failure = True, ""
        seconds = time.monotonic() - begun_s
        self._note(variant, fetch, f"the next weights are on {fetch.node} after {seconds:.0f} s")

    def _forget_others(self, variants: Iterable[Variant], nodes: Collection[str]) -> None:
        """Of these variants what was fetched to nodes that are gone, or where nothing serves now."""
        keys = {key_of(variant) for variant in variants}
        self._drop(key for key in self._fetches if key[0] in keys and key[1] not in nodes)

    def failure(self, variants: Iterable[Variant]) -> str:
        """Why weights of these cannot be had; empty: nothing is wrong."""
        fetches = (each for variant in variants for each in self._of(variant))
        return next((each.failure for each in fetches if each.failure), "")

    def stage(self, variants: Iterable[Variant]) -> str:
        """What goes on, for `bora status`; empty: nothing."""
        fetches = (each for variant in variants for each in self._of(variant))
        under_way = (each for each in fetches if each.stage and not each.done and not each.failure)
        return next((f"{each.stage} on {each.node}" for each in under_way), "")

    def keep(self, generations: Collection[GenerationKey]) -> None:
        """Forget, and end, what is fetched for others than these."""
        self._drop(key for key in self._fetches if key[0] not in generations)

    def _drop(self, keys: Iterable[tuple[GenerationKey, str]]) -> None:
        for key in list(keys):
            fetch = self._fetches.pop(key)
            if fetch.task is not None:
                fetch.task.cancel()

    def _of(self, variant: Variant) -> list[_Fetch]:
        wanted = key_of(variant)
        return [fetch for (key, _), fetch in self._fetches.items() if key == wanted]

    def _note(self, variant: Variant, fetch: _Fetch, text: str, *, reason: str = "") -> None:
        self._events.note(
            time.time(), "weights", text, model=variant.model, node=fetch.node, reason=reason
        )
