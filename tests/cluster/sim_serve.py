"""A Ray cluster with Serve, by the second: nodes with GPUs, generations, replicas that come and go.

Engines of a variant whose `max_num_seqs` is odd do not start.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cluster.generations import Census, Deployed, GenerationKey, ServedReplica, key_of
from cluster.messages import ReplicaReport
from cluster.placement_check import NodeFacts
from placement.plan import Variant
from tests.builders import a_report

START_S, STOP_S, TRIES = 3, 2, 3
_START = 1000.0  # of our clock, which is as monotonic as the real one


@dataclass
class Replica:
    name: str
    key: GenerationKey
    began_s: float
    state: str = "STARTING"
    node: str = ""  # empty: it waits for a GPU
    left_s: int = START_S
    healthy: bool = True

    @property
    def serves(self) -> bool:
        return self.state == "RUNNING" and self.healthy


@dataclass
class Generation:
    variant: Variant
    target: int
    failures: int = 0
    deleting: bool = False
    replicas: list[Replica] = field(default_factory=list)

    @property
    def gave_up(self) -> bool:
        return self.failures >= TRIES


class SimServe:
    """`cluster.lifecycle.Counts`; `asked` sees each wish before it is granted."""

    def __init__(self, nodes: Iterable[tuple[str, str, int]], seed: int) -> None:
        self.now_s = _START
        self.nodes = {name: (pool, gpus) for name, pool, gpus in nodes}
        self.generations: dict[GenerationKey, Generation] = {}
        self.asked: Callable[[GenerationKey, int], None] = lambda *_: None
        self._random = random.Random(seed)
        self._count = 0

    # What is asked of Serve

    def deploy(self, variant: Variant, count: int) -> None:
        key = key_of(variant)
        known = self.generations.get(key)
        if known is None or known.deleting:
            left = list(known.replicas) if known else []
            for replica in left:
                self._stop(replica)
            self.generations[key] = Generation(variant, count, replicas=left)
        else:
            known.variant, known.target, known.failures = variant, count, 0

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        self.asked(key, replicas)
        self.generations[key].target = replicas
        self._settle()

    async def delete(self, key: GenerationKey) -> None:
        self.asked(key, 0)
        self.generations[key].deleting, self.generations[key].target = True, 0
        self._settle()

    async def again(self, variant: Variant, count: int) -> None:
        self.deploy(variant, count)
        self._settle()

    async def pins(self, variant: Variant) -> tuple[str, ...]:
        return ()

    async def unpin(self, variant: Variant, replicas: int) -> None:
        raise AssertionError(f"{variant.variant} is no gang of {replicas}")

    # What is seen of it

    def census(self) -> Census:
        here = {name: NodeFacts(name, name, pool, {"bora_slot": float(gpus)}, {})
                for name, (pool, gpus) in self.nodes.items()}  # fmt: skip
        waiting = (r.name for g in self.generations.values() for r in g.replicas if not r.node)
        return Census(
            begun_s=self.now_s,
            generations={
                key: Deployed(
                    config=each.variant.model_dump(mode="json"),
                    target=each.target,
                    replicas=tuple(
                        ServedReplica(r.name, r.state, r.node, time.time() - self.now_s + r.began_s)
                        for r in each.replicas
                    ),
                    deleting=each.deleting,
                    gave_up=each.gave_up,
                )
                for key, each in self.generations.items()
            },
            placeless=frozenset(waiting),
            nodes=here,
        )

    def serving(self, keys: Iterable[GenerationKey]) -> int:
        """Replicas that answer in truth."""
        return sum(r.serves for key in keys if key in self.generations
                   for r in self.generations[key].replicas)  # fmt: skip

    @property
    def replicas(self) -> list[Replica]:
        return [replica for each in self.generations.values() for replica in each.replicas]

    def free(self, pool: str) -> int:
        """GPUs that nobody has."""
        return sum(self._free(name) for name, (of, _) in self.nodes.items() if of == pool)

    def _free(self, node: str) -> int:
        return self.nodes[node][1] - sum(replica.node == node for replica in self.replicas)

    # What happens

    def die(self, replica: Replica) -> None:
        self.generations[replica.key].replicas.remove(replica)
        self._settle()

    def lose(self, node: str) -> None:
        del self.nodes[node]
        for replica in [each for each in self.replicas if each.node == node]:
            if replica.state == "STARTING":  # Serve takes it for one that cannot start
                self.generations[replica.key].failures += 1
            self.die(replica)

    def second(
        self, tell: Callable[[ReplicaReport], object], orders: Callable[[str], bool]
    ) -> None:
        """A second passes; replicas report to `tell`, and ask `orders` whether to go."""
        self.now_s += 1
        for replica in self.replicas:
            broken = self.generations[replica.key].variant.shape.max_num_seqs % 2
            if not replica.node:
                continue
            if replica.state == "RUNNING" and orders(replica.name):
                self._stop(replica)  # it ends by itself, and Serve starts another
            replica.left_s -= 1
            if replica.state == "STARTING" and replica.left_s <= 0:
                self._started(replica, tell, broken=bool(broken))
            elif replica.state == "STOPPING" and replica.left_s <= 0:
                self.generations[replica.key].replicas.remove(replica)
            elif replica.state == "RUNNING":
                tell(report_of(replica, "ready" if replica.healthy else "unhealthy"))
            elif replica.state == "STOPPING" and replica.left_s < STOP_S:
                tell(report_of(replica, "draining"))  # a second late
        self._settle()
        for key in [k for k, g in self.generations.items() if g.deleting and not g.replicas]:
            del self.generations[key]
        self._place()

    def _started(
        self, replica: Replica, tell: Callable[[ReplicaReport], object], *, broken: bool
    ) -> None:
        if broken:
            tell(report_of(replica, "failed"))
            self.generations[replica.key].failures += 1
            self.generations[replica.key].replicas.remove(replica)
        else:
            replica.state = "RUNNING"
            tell(report_of(replica, "ready"))

    def _settle(self) -> None:
        """Serve stops who is too many, first who has no place, and starts who is missing."""
        for key, each in self.generations.items():
            alive = [replica for replica in each.replicas if replica.state != "STOPPING"]
            self._random.shuffle(alive)
            alive.sort(key=lambda replica: (replica.state == "RUNNING", bool(replica.node)))
            for replica in alive[: max(len(alive) - each.target, 0)]:
                self._stop(replica)
            for _ in range(0 if each.gave_up else each.target - len(alive)):
                self._count += 1
                each.replicas.append(Replica(f"r{self._count}", key, self.now_s))

    def _stop(self, replica: Replica) -> None:
        if not replica.node:
            self.generations[replica.key].replicas.remove(replica)
        elif replica.state != "STOPPING":
            replica.state, replica.left_s = "STOPPING", STOP_S

    def _place(self) -> None:
        waiting = [each for each in self.replicas if not each.node]
        self._random.shuffle(waiting)
        for replica in waiting:
            wanted = self.generations[replica.key].variant.pool
            for node, (pool, _) in self.nodes.items():
                if pool == wanted and self._free(node) > 0 and not replica.node:
                    replica.node = node


def report_of(replica: Replica, state: str) -> ReplicaReport:
    """Its heartbeat."""
    return a_report(
        replica=replica.name,
        variant=replica.key.variant,
        version=replica.key.version,
        state=state,
        node_id=replica.node,
    )
