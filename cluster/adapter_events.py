"""What is worth telling of a replica's adapters, from one heartbeat to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cluster.messages import ReplicaReport
from cluster.model_cache import DOWNLOADING


class AdapterEvent(NamedTuple):
    """`reason`: why it could not be loaded."""

    text: str
    reason: str = ""


def adapter_events(before: ReplicaReport, now: ReplicaReport) -> Iterator[AdapterEvent]:
    """What is downloaded, loaded, unloaded, or failed in another way than before."""
    for name, stage in now.adapter_stages.items():
        if stage.startswith(DOWNLOADING) and not _downloading(before, name):
            size = stage.rpartition(" of ")[2]
            yield AdapterEvent(f"replica {now.replica}: downloading adapter {name}, {size}")
    for name, served in now.adapters.items():
        if before.adapters.get(name) != served:
            yield AdapterEvent(f"replica {now.replica}: adapter {name} loaded")
    for name in before.adapters:
        if name not in now.adapters:
            yield AdapterEvent(f"replica {now.replica}: adapter {name} taken out")
    for name, reason in now.adapter_failures.items():
        if before.adapter_failures.get(name) != reason:
            yield AdapterEvent(f"replica {now.replica}: adapter {name} not loaded", reason)


def _downloading(report: ReplicaReport, name: str) -> bool:
    return report.adapter_stages.get(name, "").startswith(DOWNLOADING)
