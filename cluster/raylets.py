"""How a box is given to Ray: one Ray node for each kind of its devices.

Ray counts GPUs and looks at the first one for their type, so on a mixed box, or one whose GPUs are
cut by MIG, a single Ray node would hand out the wrong devices. A Ray node for each kind, which sees
only its own devices, makes both come out right.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.names import GPU_LABEL, MEMORY_LABEL, POOL_LABEL
from cluster.priority import NORMAL_PRIORITY
from cluster.probes.speeds import GPUS_VARIABLE
from placement.catalogue import Catalogue
from placement.found_inventory import device_kinds, pools_of
from placement.inventory import Pool
from placement.node_facts import NodeFacts


@dataclass(frozen=True, slots=True)
class Raylet:
    """One Ray node of a box."""

    pool: Pool
    labels: Mapping[str, str]
    environment: Mapping[str, str]

    def start_arguments(self) -> str:
        """What stands before and after `ray start`, for a shell."""
        variables = {**NORMAL_PRIORITY, **self.environment}
        environment = [f"{key}={shlex.quote(value)}" for key, value in variables.items()]
        labels = ",".join(f"{key}={value}" for key, value in self.labels.items())
        options = ["--num-gpus", str(self.pool.gpus_per_node), "--labels", shlex.quote(labels)]
        return " ".join([*environment, "ray start", *options])


def raylets(facts: NodeFacts, catalogue: Catalogue, pool: str) -> tuple[Raylet, ...]:
    """The Ray nodes that the box of `facts` needs in a pool called `pool`; none without GPUs.

    On a box of several kinds the pools are called POOL-KIND.
    """
    kinds = device_kinds(facts, catalogue)
    # Ray counts from 0: it would hand out one that is broken, or another's.
    gapless = [gpu.index for gpu in facts.gpus] == list(range(len(facts.gpus)))
    alone = len(kinds) == 1 and gapless
    return tuple(
        Raylet(each, _labels(each), _environment(kinds[each.gpu], alone=alone))
        for each in pools_of(facts, catalogue, pool)
    )


def _labels(pool: Pool) -> dict[str, str]:
    labels = {POOL_LABEL: pool.name, GPU_LABEL: pool.gpu}
    if pool.memory_gib_per_gpu is not None:
        labels[MEMORY_LABEL] = str(pool.memory_gib_per_gpu)
    return labels


def _environment(uuids: tuple[str, ...], *, alone: bool) -> dict[str, str]:
    if alone and not any(uuid.startswith("MIG-") for uuid in uuids):
        return {}  # Ray sees it right by itself, and GPUs keep their numbers
    listed = ",".join(uuids)
    return {"CUDA_VISIBLE_DEVICES": listed, GPUS_VARIABLE: listed}
