"""Surveyor: probes nodes as they join, keeps what was found, and says where labels lie."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray

from cluster.facts_file import keep_facts, kept_facts
from cluster.messages import EventKind, NodeList
from cluster.names import POOL_LABEL
from cluster.ray_inventory import node_name, pool_of, pooled, unlabelled
from cluster.ray_survey import Survey
from placement.catalogue import Catalogue
from placement.errors import PlacementError
from placement.found_inventory import with_findings
from placement.inventory import Inventory
from placement.mismatches import mismatches
from placement.node_facts import NodeFacts

PERIOD_S = 2.0
_RECENT_S = 600.0
_ATTEMPTS = 3
log = logging.getLogger("bora.surveyor")

Note = Callable[[EventKind, str, str], None]  # kind, node, text


class Probes(Protocol):
    """What the surveyor asks of the cluster. Every call may block."""

    def nodes(self) -> list[dict[str, Any]]:
        """Those that are up, as Ray describes them."""
        ...

    def look(self, nodes: Sequence[Mapping[str, Any]]) -> Survey:
        """Their facts without measurements."""
        ...

    def measure(self, nodes: Sequence[Mapping[str, Any]], found: Sequence[NodeFacts]) -> Survey:
        """`found` with speeds."""
        ...


class Surveyor:
    """Facts by node. `note` is told of nodes that come and go, and of every lie."""

    def __init__(self, probes: Probes, file: Path, catalogue: Catalogue, note: Note) -> None:
        self._probes = probes
        self._file = file
        self._catalogue = catalogue
        self._note = note
        self._kept = kept_facts(file)
        self._facts: dict[str, NodeFacts] = {}
        self._alive: dict[str, Mapping[str, Any]] = {}
        self._failures: dict[str, int] = {}
        self._pending = {"nodes"}  # until the first look
        self._probing: asyncio.Task[None] | None = None
        self._told: set[tuple[str, str, str]] = set()
        self._label_problems: tuple[str, ...] = ()

    async def run_forever(self) -> None:
        """Look for new nodes every two seconds; while the head is away, wait for it."""
        while True:
            try:
                await self.round()
            except ray.exceptions.RayError as error:
                log.warning("the nodes cannot be looked at: %s", error)
            await asyncio.sleep(PERIOD_S)

    def nodes(self) -> NodeList:
        """All that is known of the nodes that are up."""
        declared, problems = self._declared()
        return NodeList(
            nodes=tuple(self._facts[name] for name in sorted(self._facts)),
            pending=tuple(sorted(self._pending)),
            declared=None if problems else declared,
        )

    def corrected(self, declared: Inventory) -> Inventory:
        """`declared` with what was measured."""
        return with_findings(declared, tuple(self._facts.values()))

    async def round(self) -> None:
        """One look at which nodes are up; probes of new ones go on in the background."""
        nodes = {node_name(node): node for node in await asyncio.to_thread(self._probes.nodes)}
        self._come_and_gone(nodes)
        if self._probing is not None:
            if not self._probing.done():  # minutes, where engines hold the GPUs
                return
            done, self._probing = self._probing, None
            done.result()
        new = {name: node for name, node in nodes.items() if self._is_open(name)}
        self._pending = set(new)
        if new:
            self._probing = asyncio.create_task(self._probe_all(new))

    async def _probe_all(self, new: Mapping[str, Mapping[str, Any]]) -> None:
        known = {name: self._probed_before(name, node) for name, node in new.items()}
        self._facts |= {name: facts for name, facts in known.items() if facts is not None}
        await self._probe({name: node for name, node in new.items() if known[name] is None})
        gone = self._facts.keys() - self._alive.keys()
        for name in gone:
            del self._facts[name]
        self._pending = set()
        try:
            await asyncio.to_thread(keep_facts, self._file, self._facts.values())
        except OSError as error:  # the next controller probes again
            log.warning("what was found on the nodes is not kept: %s", error)
        self._say_lies()

    async def _probe(self, new: Mapping[str, Mapping[str, Any]]) -> None:
        if not new:
            return
        survey = await asyncio.to_thread(self._probes.look, list(new.values()))
        for name, why in survey.unheard.items():
            self._failures[name] = self._failures.get(name, 0) + 1
            self._note("node-unprobed", name, f"its probe failed: {why}")
        self._facts |= {facts.node: facts for facts in survey.found}
        # Hosts without GPUs have nothing whose speed a plan would depend on.
        with_gpus = [facts for facts in survey.found if facts.gpus]
        if with_gpus:
            speeds = await asyncio.to_thread(self._probes.measure, list(new.values()), with_gpus)
            self._facts |= {facts.node: facts for facts in speeds.found}

    def _is_open(self, name: str) -> bool:
        return name not in self._facts and self._failures.get(name, 0) < _ATTEMPTS

    def _probed_before(self, name: str, node: Mapping[str, Any]) -> NodeFacts | None:
        """By an earlier controller, or a moment ago by the command that started this cluster."""
        host = node["NodeManagerHostname"]
        # Another host may be called alike, or the host be shared by several Ray nodes.
        alone = sum(each["NodeManagerHostname"] == host for each in self._alive.values()) == 1
        for facts in self._kept:
            fresh = time.time() - facts.probed_at_s < _RECENT_S
            here = alone and facts.node == facts.host == host
            if facts.node == name or (here and fresh):
                labels = dict(node["Labels"])
                changes = {"node": name, "pool": labels.get(POOL_LABEL, ""), "labels": labels}
                return facts.model_copy(update=changes)
        return None

    def _come_and_gone(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        for name in sorted(nodes.keys() - self._alive.keys()):
            self._note("node-joined", name, f"node {name} joined")
            if why := unlabelled(nodes[name]):
                self._note("mismatch", name, why)
        for name in sorted(self._alive.keys() - nodes.keys()):
            self._note("node-lost", name, f"node {name} is gone")
            gone = self._facts.pop(name, None)
            self._failures.pop(name, None)
            self._told = {told for told in self._told if gone is None or told[0] != gone.host}
        self._alive = dict(nodes)
        self._say_labels()

    def _say_labels(self) -> None:
        """Contradictions, when they are new: no plan can be made until they are cured."""
        _, problems = self._declared()
        for problem in problems:
            if problem not in self._label_problems:
                self._note("mismatch", "", problem)
        self._label_problems = problems

    def _say_lies(self) -> None:
        declared, _ = self._declared()
        if declared is None:
            return
        found = tuple(self._facts.values())
        for lie in mismatches(declared, found, catalogue=self._catalogue):
            key = (lie.host, lie.rule, lie.found)
            if lie.rule != "node-missing" and key not in self._told:
                self._told.add(key)
                self._note("mismatch", lie.host, str(lie))

    def _declared(self) -> tuple[Inventory | None, tuple[str, ...]]:
        """What the nodes' labels say (None: nothing), and of which pools they make no sense."""
        pools, problems = [], []
        for name, nodes in pooled(list(self._alive.values())).items():
            try:
                pool = pool_of(name, nodes)
                self._catalogue.gpu(pool.gpu)
                pools.append(pool)
            except PlacementError as error:
                problems.append(f"pool {name}: {error}")
        return (Inventory(pools=tuple(pools)) if pools else None), tuple(problems)
