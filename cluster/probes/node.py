"""All facts of this host together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping

from cluster.probes import host
from cluster.probes.nvidia_smi import Driver, ask_driver
from cluster.probes.speeds import GPUS_VARIABLE, with_speeds
from placement.node_facts import NodeFacts


def silent(text: str) -> None:
    """A progress that nobody sees."""
    del text


def probe(
    *,
    node: str = "",
    pool: str = "",
    labels: Mapping[str, str] | None = None,
    measure: bool = True,
    progress: Callable[[str], None] = silent,
) -> NodeFacts:
    """What this host has; with `measure` also how fast it is (under two minutes, usually 15 s).

    Of a box that is shared out among several Ray nodes, only the GPUs of this one
    (`$BORA_GPUS`, UUIDs).
    """
    progress("asking the driver")
    driver = _own(ask_driver(), os.environ.get(GPUS_VARIABLE, ""))
    name, features = host.cpu()
    progress("disk" if measure else "host")
    own_name = socket.gethostname()
    facts = NodeFacts(
        node=node or own_name,
        host=own_name,
        pool=pool,
        labels=dict(labels or {}),
        driver=driver.version,
        gpus=driver.gpus,
        pairs=driver.pairs,
        host_memory_bytes=host.host_memory_bytes(),
        cpu=name,
        cores=os.cpu_count() or 1,
        cpu_features=features,
        disk=host.disk(host.cache_folder(), measure=measure),
        nics=host.nics(),
        versions=host.versions(),
        problems=(driver.problem,) if driver.problem else (),
        probed_at_s=time.time(),
    )
    return with_speeds(facts, progress) if measure else facts


def _own(driver: Driver, listed: str) -> Driver:
    """The part of the box that `listed` UUIDs make up; empty: all of it."""
    uuids = set(filter(None, listed.split(",")))
    if not uuids:
        return driver
    gpus = []
    for gpu in driver.gpus:
        slices = tuple(each for each in gpu.mig_slices if each.uuid in uuids)
        if slices or gpu.uuid in uuids:
            gpus.append(gpu.model_copy(update={"mig_slices": slices}))
    kept = {gpu.index for gpu in gpus}
    pairs = tuple(pair for pair in driver.pairs if {pair.first, pair.second} <= kept)
    return Driver(driver.version, tuple(gpus), pairs, driver.problem)
