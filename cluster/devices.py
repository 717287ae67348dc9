"""Devices: the GPUs of this node that an engine runs on, by index, and that no other runs there.

Ray counts GPUs and hands out any; the plan names them. So an engine takes the ones that the plan
gives a replica of its variant on this node, by a lock on a file for each. The engine's guard holds
the lock, and it ends last: a GPU is free when nothing of the engine is left that was on it, also
when the replica, the raylet or the controller died before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.errors import EngineFailed
from cluster.processes import is_alive

HOLD_TIMEOUT_S = 60.0  # an engine that is being ended has 5 s for that, and its memory a few more
_PERIOD_S = 0.2


@dataclass(slots=True)
class HeldDevices:
    """Locks on GPUs. `files` are handed on to the engine's guard, then `let_go` of here.

    `environment` makes CUDA see exactly these GPUs.
    """

    gpus: tuple[int, ...]
    files: tuple[int, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def let_go(self) -> None:
        """Close this process's copies; who inherited them still holds the GPUs."""
        for file in self.files:
            os.close(file)
        self.files = ()


class DeviceLocks:
    """The locks of a Ray node's GPUs. Ray nodes on one host count their own GPUs each.

    `identifiers` are what CUDA knows them by: their numbers, or UUIDs on mixed or cut boxes.
    """

    def __init__(
        self, node_id: str, identifiers: Sequence[str], folder: Path | None = None
    ) -> None:
        self._node_id = node_id
        self._identifiers = identifiers
        self._total = len(identifiers)
        shared = Path(tempfile.gettempdir()) / f"bora-gpus-{os.getuid()}"
        self._folder = folder or shared

    def hold(
        self,
        planned: Sequence[tuple[int, ...]],
        count: int,
        *,
        owner: str,
        timeout_s: float = HOLD_TIMEOUT_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> HeldDevices:
        """The first of the `planned` sets that is free, else other `count` GPUs that are.

        While the holder of a planned one is dead and only its engine still ends, that is waited for.

        Raises:
            EngineFailed: no `count` GPUs came free within `timeout_s`; says who holds them.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + timeout_s
        # A node that the plan does not name may have fewer than those that it names.
        sets = [gpus for gpus in planned if len(gpus) == count and max(gpus) < self._total]
        while True:
            with self._alone():
                if (held := self._first_free(sets, count, owner)) is not None:
                    return held
            if time.monotonic() > deadline:
                raise EngineFailed(self._refusal(count, timeout_s))
            sleep(_PERIOD_S)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Who looks whether a GPU is free holds it for that moment: one process at a time looks."""
        with (self._folder / f"{self._node_id}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _first_free(
        self, planned: Sequence[tuple[int, ...]], count: int, owner: str
    ) -> HeldDevices | None:
        soon = any(self._will_be_free(gpus) for gpus in planned)
        for gpus in planned if soon else [*planned, *self._blocks(count)]:
            if (held := self._lock(gpus, owner)) is not None:
                return held
        return None

    def _blocks(self, count: int) -> list[tuple[int, ...]]:
        """GPUs that lie together from an index that their number divides, then the free ones."""
        firsts = range(0, self._total - count + 1, count)
        free = [gpu for gpu in range(self._total) if not self._holder(gpu)]
        blocks = [tuple(range(first, first + count)) for first in firsts]
        return [*blocks, tuple(free[:count])] if len(free) >= count else blocks

    def _will_be_free(self, gpus: Sequence[int]) -> bool:
        """Held, but by nobody who lives."""
        holders = [holder for gpu in gpus if (holder := self._holder(gpu))]
        return bool(holders) and not any(_lives(holder) for holder in holders)

    def _lock(self, gpus: tuple[int, ...], owner: str) -> HeldDevices | None:
        held = HeldDevices(gpus, (), device_environment(gpus, self._identifiers))
        for gpu in gpus:
            file = os.open(self._file(gpu), os.O_RDWR | os.O_CREAT, 0o600)
            held.files = (*held.files, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.let_go()
                return None
        started_s = psutil.Process().create_time()
        for file in held.files:
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()} {started_s} {owner}".encode(), 0)
        return held

    def _holder(self, gpu: int) -> str:
        """What the holder wrote of itself; empty: the GPU is free."""
        with contextlib.suppress(FileNotFoundError), self._file(gpu).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read() or "?"
        return ""

    def _refusal(self, count: int, timeout_s: float) -> str:
        holders = [(gpu, self._holder(gpu)) for gpu in range(self._total)]
        held = "; ".join(
            f"GPU {gpu} is held by {holder.split()[-1]}" for gpu, holder in holders if holder
        )
        return (
            f"no {count} of the node's {self._total} GPUs came free within {timeout_s:.0f} s: "
            f"{held or 'the node has too few'}"
        )

    def _file(self, gpu: int) -> Path:
        return self._folder / f"{self._node_id}-{gpu}.lock"


def _lives(holder: str) -> bool:
    pid, started_s, *_ = [*holder.split(), "0", "0"]
    return pid.isdigit() and is_alive(int(pid), float(started_s))


def device_environment(gpus: Sequence[int], identifiers: Sequence[str]) -> dict[str, str]:
    """What makes CUDA see exactly these GPUs, in this order.

    By default CUDA counts the fastest GPU first; plans and NVML count by PCI address.
    """
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(identifiers[gpu] for gpu in gpus),
    }
