"""All facts of this host together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping

from cluster.probes import host
from cluster.probes.nvidia_smi import Driver, ask_driver
from cluster.probes.speeds import GPUS_VARIABLE, with_speeds
from placement.node_facts import DiskFacts, NodeFacts


def silent(text: str) -> None:
    """A progress that nobody sees."""
    del text


def gpus_listed() -> str | None:
    """GPUs that this process may use, as its environment says; None: all.

    Those of a Ray node on a box that is shared out among several (`$BORA_GPUS`), else what CUDA
    itself would go by.
    """
    return os.environ.get(GPUS_VARIABLE) or os.environ.get("CUDA_VISIBLE_DEVICES")


def probe(
    *,
    node: str = "",
    pool: str = "",
    labels: Mapping[str, str] | None = None,
    measure: bool = True,
    progress: Callable[[str], None] = silent,
    listed: Callable[[], str | None] = gpus_listed,
) -> NodeFacts:
    """What this host has; with `measure` also how fast it is (under two minutes, usually 15 s).

    Of its GPUs only those that are `listed`: indices, UUIDs or beginnings of them.
    """
    progress("asking the driver")
    driver = _own(ask_driver(), listed())
    name, features = host.cpu()
    progress("disk" if measure else "host")
    disk, disk_problem = _disk(measure=measure)
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
        disk=disk,
        nics=host.nics(),
        versions=host.versions(),
        problems=(*driver.problems, *disk_problem),
        probed_at_s=time.time(),
    )
    return with_speeds(facts, progress) if measure else facts


def _disk(*, measure: bool) -> tuple[DiskFacts | None, tuple[str, ...]]:
    """Of the model cache, or why it cannot be told."""
    try:
        return host.disk(host.cache_folder(), measure=measure), ()
    except OSError as error:
        return None, (f"the model cache (HF_HOME): {error}",)


def _own(driver: Driver, listed: str | None) -> Driver:
    """The part of the box that is `listed`; None: all of it."""
    if listed is None:
        return driver
    wanted = [part for each in listed.split(",") if (part := each.strip())]
    uuids = tuple(each for each in wanted if not each.isdigit())
    gpus = []
    for gpu in driver.gpus:
        slices = tuple(each for each in gpu.mig_slices if each.uuid.startswith(uuids))
        if str(gpu.index) in wanted or gpu.uuid.startswith(uuids):
            gpus.append(gpu)
        elif slices:
            gpus.append(gpu.model_copy(update={"mig_slices": slices}))
    kept = {gpu.index for gpu in gpus}
    pairs = tuple(pair for pair in driver.pairs if {pair.first, pair.second} <= kept)
    return Driver(driver.version, tuple(gpus), pairs, driver.problems)
