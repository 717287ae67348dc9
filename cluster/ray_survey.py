"""Probes the nodes of a Ray cluster, each by a task that runs there and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from pydantic import ValidationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.host_state import HostState, host_state
from cluster.names import POOL_LABEL
from cluster.probes.host import cache_folder
from cluster.probes.node import probe, silent
from cluster.probes.speeds import TIMEOUT_S as SPEEDS_TIMEOUT_S
from cluster.probes.speeds import with_speeds
from cluster.ray_inventory import node_name
from cluster.seat import gpus_of_ray_node
from placement.node_facts import NodeFacts

LOOK_TIMEOUT_S = 60.0  # a worker starts, the driver answers, the disk is looked at
_PERIOD_S = 0.5
_CLOCK_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found, and why nothing was found on the other nodes."""

    found: tuple[NodeFacts, ...]
    unheard: Mapping[str, str]


class RayProbes:
    """The cluster that this process has joined, as the surveyor sees it."""

    def nodes(self) -> list[dict[str, Any]]:
        """Those that are up."""
        return [node for node in ray.nodes() if node["Alive"]]

    def look(self, nodes: Sequence[Mapping[str, Any]]) -> Survey:
        """Their facts without measurements."""
        return look(nodes)

    def measure(self, nodes: Sequence[Mapping[str, Any]], found: Sequence[NodeFacts]) -> Survey:
        """`found` with speeds."""
        return measure(nodes, found)


def look(nodes: Sequence[Mapping[str, Any]], progress: Callable[[str], None] = silent) -> Survey:
    """Facts of `nodes` (as `ray.nodes()` gives them) without measurements, and their clocks."""
    tasks = {node_name(node): _on(node, _look, node_name(node), node["Labels"]) for node in nodes}
    survey = _gather(tasks, LOOK_TIMEOUT_S, progress)
    by_name = {node_name(node): node for node in nodes}
    found = (_with_clock(facts, by_name[facts.node]) for facts in survey.found)
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Survey(tuple(told_apart(facts, alive) for facts in found), survey.unheard)


def told_apart(facts: NodeFacts, nodes: Sequence[Mapping[str, Any]]) -> NodeFacts:
    """`facts`, the host called with its address too where another of `nodes` has the same name."""
    addresses = {
        node["NodeManagerAddress"] for node in nodes if node["NodeManagerHostname"] == facts.host
    }
    if len(addresses) < 2 or not facts.address:
        return facts
    return facts.model_copy(update={"host": f"{facts.host} ({facts.address})"})


def measure(
    nodes: Sequence[Mapping[str, Any]],
    found: Sequence[NodeFacts],
    progress: Callable[[str], None] = silent,
) -> Survey:
    """`found` with speeds. The task holds all GPUs of its node: no engine runs there meanwhile.

    Where engines hold them the task waits for them and is given up; those facts stay as they are.
    """
    by_name = {node_name(node): node for node in nodes}
    tasks = {
        facts.node: _on(
            by_name[facts.node],
            _measure,
            facts.model_dump_json(),
            num_gpus=by_name[facts.node]["Resources"].get("GPU", 0) if facts.gpus else 0,
        )
        for facts in found
        if facts.node in by_name
    }
    survey = _gather(tasks, SPEEDS_TIMEOUT_S + LOOK_TIMEOUT_S, progress)
    measured = {facts.node: facts for facts in survey.found}
    return Survey(tuple(measured.get(facts.node, facts) for facts in found), survey.unheard)


def host_states(nodes: Sequence[Mapping[str, Any]]) -> dict[str, HostState]:
    """What `bora doctor` asks of each host beside its facts, by node."""
    tasks = {node_name(node): _on(node, _host_state) for node in nodes}
    deadline = time.monotonic() + LOOK_TIMEOUT_S
    states = {}
    for name, task in tasks.items():
        try:
            text = ray.get(task, timeout=max(0.1, deadline - time.monotonic()))
            states[name] = HostState.model_validate_json(text)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError, ValidationError):
            continue  # `bora doctor` says of whom it has none
    return states


def _gather(tasks: Mapping[str, Any], timeout_s: float, progress: Callable[[str], None]) -> Survey:
    names = {task: name for name, task in tasks.items()}
    waiting, found, unheard = list(names), [], {}
    deadline = time.monotonic() + timeout_s
    while waiting and time.monotonic() < deadline:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=_PERIOD_S)
        for task in done:
            try:
                found.append(NodeFacts.model_validate_json(ray.get(task)))
            except ray.exceptions.RayError as error:
                unheard[names[task]] = str(error).splitlines()[0]
            except ValidationError:
                unheard[names[task]] = "its bora is of another version: ship the code there"
            progress(f"{names[task]}: {len(names) - len(waiting)} of {len(names)} nodes")
    for task in waiting:
        ray.cancel(task)
        unheard[names[task]] = f"no answer within {timeout_s:.0f} s"
    return Survey(tuple(sorted(found, key=lambda facts: facts.node)), unheard)


def _with_clock(facts: NodeFacts, node: Mapping[str, Any]) -> NodeFacts:
    """The best of a few rounds: the first one starts a worker, and the answer is as old as that."""
    best_offset, best_error = 0.0, float("inf")
    for _ in range(_CLOCK_ROUNDS):
        asked_s = time.time()
        try:
            theirs_s = ray.get(_on(node, _now), timeout=LOOK_TIMEOUT_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return facts
        error_s = (time.time() - asked_s) / 2
        if error_s < best_error:
            best_offset, best_error = theirs_s - asked_s - error_s, error_s
    changes = {"clock_offset_s": round(best_offset, 4), "clock_error_s": round(best_error, 4)}
    return facts.model_copy(update={**changes, "address": node["NodeManagerAddress"]})


def _on(
    node: Mapping[str, Any], act: Callable[..., Any], *arguments: Any, num_gpus: float = 0
) -> Any:
    """`act` as a task on this very node; it takes no CPU away from engines."""
    pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    remote = ray.remote(act)
    options = remote.options(
        num_cpus=0, num_gpus=num_gpus, scheduling_strategy=pinned, max_retries=0
    )
    return options.remote(*arguments)


def _now() -> float:
    return time.time()


def _look(name: str, labels: Mapping[str, str]) -> str:
    pool = labels.get(POOL_LABEL, "")
    facts = probe(node=name, pool=pool, labels=labels, measure=False, listed=gpus_of_ray_node)
    return facts.model_dump_json()


def _measure(facts: str) -> str:
    return with_speeds(NodeFacts.model_validate_json(facts), silent).model_dump_json()


def _host_state() -> str:
    return host_state(cache=cache_folder()).model_dump_json()
