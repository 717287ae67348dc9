"""What gateways tell in their metrics, and the memory that processes use."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 20.0
_DELAY = "bora_gateway_endpoint_table_delay_seconds"
_READY = "bora_gateway_endpoints"
_ALIVE = "bora_gateway_endpoint_alive"


@dataclass(frozen=True, slots=True)
class Page:
    """A gateway's metrics at one moment."""

    families: Mapping[str, Metric]

    @classmethod
    def of(cls, url: str) -> Page:
        """Read now."""
        text = _read(urllib.request.Request(url + "/metrics")).decode()
        return cls({family.name: family for family in text_string_to_metric_families(text)})

    @property
    def ready(self) -> dict[str, int]:
        """Endpoints of each model in its table."""
        return {s.labels["model"]: int(s.value) for s in self._samples(_READY)}

    def dead(self) -> set[str]:
        """Endpoints that it sends nothing to since its health checks fail."""
        return {s.labels["endpoint"] for s in self._samples(_ALIVE) if s.value == 0}

    def delays(self) -> dict[float, float]:
        """How many tables were in force within so many seconds of what they tell."""
        return {
            float(s.labels["le"]): s.value
            for s in self._samples(_DELAY)
            if s.name == f"{_DELAY}_bucket"
        }

    def _samples(self, name: str) -> Iterator[Any]:
        family = self.families.get(name)
        yield from family.samples if family else ()


def _read(request: urllib.request.Request) -> bytes:
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        body: bytes = response.read()
        return body


def delays_between(before: Sequence[Page], after: Sequence[Page]) -> dict[float, float]:
    """Of all gateways together, by upper bounds; cumulative, as Prometheus tells them."""
    found: dict[float, float] = {}
    for earlier, later in zip(before, after, strict=True):
        known = earlier.delays()
        for bound, count in later.delays().items():
            found[bound] = found.get(bound, 0.0) + count - known.get(bound, 0.0)
    return found


def quantile(cumulative: Mapping[float, float], share: float) -> float | None:
    """The bound below which at least `share` of the counts lie; None: there are none."""
    total = max(cumulative.values(), default=0.0)
    if total == 0:
        return None
    return min(bound for bound, count in cumulative.items() if count >= share * total)


def memory_mib(pids: Collection[int]) -> float:
    """What processes hold by themselves, and their share of what they hold together, MiB.

    What lies in swap counts as well.
    """
    total_kib = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("Pss", "SwapPss"):
                    total_kib += int(value.split()[0])
    return total_kib / 2**10


def free_gib() -> float:
    """What the machine has left for others, in memory and swap."""
    return free_memory_gib() + float(psutil.swap_memory().free) / 2**30


def free_memory_gib() -> float:
    """Without swap. What lies in both is there for the asking, though nobody calls it free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return (kib["MemAvailable"] + kib["SwapCached"]) / 2**20


def busy_cores(seconds: float) -> float:
    """How many cores of the machine work, on average over these seconds. Blocks for as long."""
    return float(psutil.cpu_percent(interval=seconds)) / 100 * float(psutil.cpu_count() or 1)
