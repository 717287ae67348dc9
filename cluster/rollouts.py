"""Roll-outs: models whose shape changed, each one step further per census (`cluster.rollout`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from cluster.autoscaler import Autoscaler
from cluster.event_log import EventLog
from cluster.generations import RUNNING, STOPPING, Census, Deployed, GenerationKey, key_of
from cluster.messages import ReplicaReport
from cluster.prefetch import NodeFetch, Prefetch
from cluster.registry import Registry
from cluster.rollout import Capacity, Incoming, Outgoing, forgettable, outgoing_targets
from placement.plan import Variant
from placement.routing_policy import Role

_ANSWERING: tuple[Role, ...] = ("whole", "decode")
NO_ROOM_S = 4.0  # a new replica that waits so long for GPUs finds none until an old one goes


class Replaces(Protocol):
    """What Serve is asked for."""

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        """Set a generation's replica count."""
        ...

    async def delete(self, key: GenerationKey) -> None:
        """Let a generation finish what runs, and forget it."""
        ...


class Rollouts:
    """Of all models. `fetch` brings weights to nodes ahead; what happens is told to `events`.

    `hopeless(key)`: Serve gave it up again and again, and nobody knows why.
    """

    def __init__(
        self,
        registry: Registry,
        autoscaler: Autoscaler,
        deployer: Replaces,
        events: EventLog,
        *,
        fetch: NodeFetch,
        hopeless: Callable[[GenerationKey], bool],
    ) -> None:
        self._hopeless = hopeless
        self._registry = registry
        self._autoscaler = autoscaler
        self._deployer = deployer
        self._events = events
        self.prefetch = Prefetch(fetch, events)
        self._failing: set[GenerationKey] = set()
        self._proven: set[GenerationKey] = set()  # those with a replica that was ready
        self._before: dict[GenerationKey, int] = {}  # most replicas of those that go, since they do
        self._stages: dict[str, str] = {}  # by model
        self._freed_s: dict[str, float] = {}  # by model: when old replicas went last (monotonic)

    def stage(self, model: str) -> str:
        """How far the model's roll-out is; empty: there is none."""
        return self._stages.get(model, "")

    def heard(self, report: ReplicaReport) -> None:
        """A replica's state changed."""
        key = GenerationKey(report.variant, report.version)
        if report.state == "failed":
            self._failing.add(key)
        elif report.state == "ready":
            self._failing.discard(key)
            self._proven.add(key)

    def failing(self, key: GenerationKey) -> bool:
        """Whether a replica of it told why it did not start, and none was ready since."""
        return key in self._failing

    def forgive(self) -> None:
        """A new plan: what failed may be tried again."""
        self._failing.clear()
        self.prefetch.keep(())

    async def step(
        self, variants: Sequence[Variant], now: Census, drained: Collection[str] = ()
    ) -> None:
        """One step of every model's roll-out; `variants` are the plan's.

        On `drained` nodes (Ray's ids) nothing is placed, whoever goes there.
        """
        wanted = {key_of(variant) for variant in variants}
        self.prefetch.keep(wanted)
        self._proven &= now.generations.keys()
        self._before = {
            k: n for k, n in self._before.items() if k in now.generations.keys() - wanted
        }
        for model in {variant.model for variant in variants}:
            siblings = [variant for variant in variants if variant.model == model]
            await self._step(model, siblings, now, drained)

    async def _step(
        self, model: str, siblings: Sequence[Variant], now: Census, drained: Collection[str]
    ) -> None:
        wanted = {key_of(variant) for variant in siblings}
        all_ = {key: d for key, d in now.generations.items() if d.model == model}
        served = {key: d for key, d in all_.items() if not d.deleting}
        new = {key: d for key, d in served.items() if key in wanted}
        leaving = {key: d for key, d in served.items() if key not in wanted}
        if any(d.count(STOPPING) for key, d in all_.items() if key not in wanted):
            self._freed_s[model] = now.begun_s
        if not leaving:
            if self._stages.pop(model, ""):
                self._note(model, "done")
            return
        rates = _rates([*siblings], leaving)
        free_for = self._waiting_pools(siblings, new, now)
        old = {
            key: self._outgoing(key, d, rates[key], self._is_on(d, free_for, now, drained))
            for key, d in leaving.items()
        }
        there = self._fetched(siblings, leaving.values(), now)
        for only_reads in (False, True):  # neither can stand in for the other
            coming = {key: d for key, d in new.items() if d.only_reads == only_reads}
            going = {key: old[key] for key, d in leaving.items() if d.only_reads == only_reads}
            incoming = self._incoming(model, coming, rates, now, fetched=there)
            promised = self._promised(siblings, rates, ("prefill",) if only_reads else _ANSWERING)
            targets = outgoing_targets(going, incoming, promised)
            if targets != {key: each.target for key, each in going.items()}:
                self._freed_s[model] = now.begun_s
            await self._ask(targets, going, forgettable(going, targets, incoming, promised))
        incoming = self._incoming(model, new, rates, now, fetched=there)
        self._tell(model, siblings, old, incoming)

    def _promised(
        self,
        siblings: Iterable[Variant],
        rates: Mapping[GenerationKey, float],
        roles: Collection[Role],
    ) -> Capacity:
        promised = Capacity()
        for each in siblings:
            if each.role in roles:
                promised = promised.plus(self._autoscaler.target(each), rates[key_of(each)])
        return promised

    def _fetched(self, siblings: Iterable[Variant], old: Iterable[Deployed], now: Census) -> bool:
        """Whether weights of what comes are wherever the model serves; they are brought there."""
        homes = {each.node_id for one in old for each in one.replicas if each.state in RUNNING}
        nodes = [(home, now.nodes[home].name, now.nodes[home].pool) for home in sorted(homes)
                 if home in now.nodes]  # fmt: skip
        return self.prefetch.want(siblings, nodes)

    def _outgoing(
        self, key: GenerationKey, served: Deployed, rate: float, in_the_way: bool
    ) -> Outgoing:
        ready = self._ready(key, served)
        if ready:
            self._proven.add(key)  # of a controller before this one
        before = self._before[key] = max(self._before.get(key, 0), served.target)
        return Outgoing(
            target=served.target,
            running=served.count(*RUNNING),
            ready=ready,
            stopping=served.count(STOPPING),
            before=before,
            # Only what has served is kept without replicas, by a controller before this one too.
            proven=key in self._proven or not served.target,
            in_the_way=in_the_way,
            requests_per_s=rate,
        )

    def _ready(self, key: GenerationKey, served: Deployed) -> int:
        """Replicas that say so, without those that Serve is stopping, who will say otherwise."""
        running = {each.replica for each in served.replicas if each.state in RUNNING}
        reports = self._registry.of_generation(key)
        return sum(each.state == "ready" and each.replica in running for each in reports)

    def _waiting_pools(
        self, siblings: Iterable[Variant], new: Mapping[GenerationKey, Deployed], now: Census
    ) -> set[str]:
        """Pools of which nodes could give GPUs to new replicas that have none."""
        return {
            pool
            for variant in siblings
            if (served := new.get(key_of(variant)))
            and any(each.replica in now.placeless for each in served.replicas)
            for pool in variant.pools
        }

    def _is_on(
        self, served: Deployed, pools: Collection[str], now: Census, drained: Collection[str]
    ) -> bool:
        homes = {each.node_id for each in served.replicas if each.state in RUNNING}
        free = {home for home in homes if home in now.nodes and home not in drained}
        return any(now.nodes[home].pool in pools for home in free)

    def _incoming(
        self,
        model: str,
        served: Mapping[GenerationKey, Deployed],
        rates: Mapping[GenerationKey, float],
        now: Census,
        *,
        fetched: bool,
    ) -> Incoming:
        replicas = [each for one in served.values() for each in one.replicas]
        starting = [each for each in replicas if each.state == "STARTING"]
        waiting = [
            each
            for each in starting
            if each.replica in now.placeless and time.time() - each.started_s > NO_ROOM_S
        ]
        ready = Capacity()
        for key, one in served.items():
            ready = ready.plus(self._ready(key, one), rates[key])
        # What was freed a moment ago may just be being given out.
        stuck = now.begun_s - self._freed_s.get(model, 0.0) > NO_ROOM_S
        return Incoming(
            ready=ready,
            no_room=fetched and stuck and bool(waiting) and len(waiting) == len(starting),
            failing=any(key in self._failing for key in served),
            gave_up=any(
                each.gave_up and (key in self._failing or self._hopeless(key))
                for key, each in served.items()
            ),
        )

    async def _ask(
        self,
        targets: Mapping[GenerationKey, int],
        old: Mapping[GenerationKey, Outgoing],
        forgotten: Collection[GenerationKey],
    ) -> None:
        for key, target in targets.items():
            if key in forgotten:
                await self._deployer.delete(key)
            elif target != old[key].target:
                await self._deployer.scale(key, target)

    def _tell(
        self,
        model: str,
        siblings: Sequence[Variant],
        old: Mapping[GenerationKey, Outgoing],
        new: Incoming,
    ) -> None:
        promised = sum(map(self._autoscaler.target, siblings))
        count = sum(each.ready for each in old.values())
        text = f"{new.ready.replicas} of {promised} in the new shape, {count} in the old one"
        if new.failing or new.gave_up:
            text = f"stopped, its engine does not start: {text}"
            if not self._stages.get(model, "").startswith("stopped"):
                self._note(model, text)
        elif model not in self._stages:
            self._note(model, "begun")
        if why := self.prefetch.failure(siblings):
            text = f"stopped, its weights cannot be fetched: {why}"
        if stage := self.prefetch.stage(siblings):
            text += f"; {stage}"
        self._stages[model] = text

    def _note(self, model: str, text: str) -> None:
        self._events.note(time.time(), "rollout", text, model=model)


def _rates(
    siblings: Iterable[Variant], old: Mapping[GenerationKey, Deployed]
) -> dict[GenerationKey, float]:
    """Requests a second that one replica was planned for; all 0 where one of them is not known."""
    rates = {key_of(each): each.capacity_requests_per_s for each in siblings}
    rates |= {key: float(d.config.get("capacity_requests_per_s", 0.0)) for key, d in old.items()}
    return rates if all(rate > 0 for rate in rates.values()) else dict.fromkeys(rates, 0.0)
