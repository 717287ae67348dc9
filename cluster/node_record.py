"""NodeRecord: what a start of Ray on this host leaves for the next start or stop here."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from cluster.files import replace_private
from cluster.head_store import HeadStore
from placement.spec import Spec

log = logging.getLogger(__name__)


class NeededProcess(Spec):
    """A process without which the node is none. Its start is counted in ticks since the boot.

    A time of day would do no longer once the clock of a host that has just booted is set right.
    """

    pid: int
    started_ticks: int


class NodeRecord(Spec):
    """Of a node that runs, or ran."""

    digest: str  # of what it was started with
    boot: str  # of the host, while it ran
    needed: tuple[NeededProcess, ...]
    session: str  # folder of Ray's logs
    store: HeadStore | None = None  # of a head whose state outlives it

    @property
    def runs(self) -> bool:
        """Whether all that it needs lives."""
        return self.boot == boot_id() and all(
            _started_ticks(each.pid) == each.started_ticks for each in self.needed
        )


def needed(pid: int) -> NeededProcess | None:
    """The process as it is recorded; None: it has ended."""
    ticks = _started_ticks(pid)
    return None if ticks is None else NeededProcess(pid=pid, started_ticks=ticks)


def boot_id() -> str:
    """Another one after each boot of this host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def read_record(file: Path) -> NodeRecord | None:
    """None where there is none, or a broken one."""
    try:
        return NodeRecord.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        log.warning("%s is broken and counts as lost: %s", file, error)
        return None


def write_record(file: Path, record: NodeRecord) -> None:
    """For this account only: `store` has a password."""
    replace_private(file, record.model_dump_json())


def _started_ticks(pid: int) -> int | None:
    """When a live process began; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat[stat.rindex(b")") + 2 :].split()  # a name may hold anything
    return None if state in (b"Z", b"X") else int(fields[18])
