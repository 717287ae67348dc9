"""HeadCopy: what only the head's disk holds, a second time where Ray's own state outlives the head.

That is Redis, behind Ray's GCS. Copied are the plan, tenants with the hashes of their keys and their
limits, what they used by day, and what engines were seen to need. No key, no token: those of clients
are kept nowhere, the controller's is among its arguments, which Ray keeps itself. Of a file and its
copy the newer one counts, so that neither a disk that was lost nor an old one that came back undoes
what happened since. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cluster.errors import ClusterError
from cluster.files import replace_private
from gateway.ledger import UsageRow
from gateway.usage_store import UsageStore
from placement.spec import Spec

PERIOD_S = 5.0  # so much of tenants' usage is lost with a disk at most; plan and keys go at once
PLAN, PLAN_FILE = "plan", "plan.yaml"
_DAY = "usage/"
_SAME_S = 0.01  # file systems keep times less exactly than a copy does

log = logging.getLogger("bora.head_copy")


class KeyValues(Protocol):
    """Values that outlive this host. Each call blocks, and raises `ClusterError` when it fails."""

    def get(self, name: str) -> bytes | None:
        """None: there is none."""
        ...

    def put(self, name: str, value: bytes) -> None:
        """Keep it instead of what was there."""
        ...

    def names(self) -> list[str]:
        """All that are kept."""
        ...

    def forget(self) -> None:
        """All of them."""
        ...


class FileCopy(Spec):
    """A file, and when it was changed last (epoch seconds)."""

    changed_s: float
    text: str


class DayCopy(Spec):
    """What was used on a day, and the last report that was counted of each gateway."""

    rows: tuple[UsageRow, ...]
    sources: Mapping[str, int]


class HeadCopy:
    """Of `files` by name, `PLAN` among them, and of `usage`; in `kept`."""

    def __init__(self, files: Mapping[str, Path], usage: UsageStore, kept: KeyValues) -> None:
        self._files = files
        self._usage = usage
        self._kept = kept
        self._copied_s: dict[str, float] = {}
        self._copied_days: dict[str, int] = {}
        self._nudged = asyncio.Event()
        self._forgotten = False

    def restore(self) -> list[str]:
        """Bring to disk what is newer in the copy; what was done, in words. Blocks.

        Nothing, where bora was stopped since: a copy without a plan is of a bora that ended.

        Raises:
            ClusterError: the copy cannot be read.
        """
        if self._kept.get(PLAN) is None:
            return []
        told = [text for name in self._files if (text := self._restored(name))]
        days = [name for name in self._kept.names() if name.startswith(_DAY)]
        had_usage = self._usage.path.exists()
        for name in days:
            copy = DayCopy.model_validate_json(self._kept.get(name) or b'{"rows":[],"sources":{}}')
            self._usage.prepare()
            self._usage.merge(copy.rows, copy.sources)
        return [*told, f"usage of {len(days)} days"] if days and not had_usage else told

    def _restored(self, name: str) -> str:
        value, path = self._kept.get(name), self._files[name]
        if value is None:
            return ""
        copy = FileCopy.model_validate_json(value)
        old = path.exists()
        if old and path.stat().st_mtime >= copy.changed_s - _SAME_S:
            return ""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if old:
            path.replace(path.with_suffix(".old"))
        replace_private(path, copy.text)
        os.utime(path, (copy.changed_s, copy.changed_s))
        return f"{path.name}, older on this disk (now {path.stem}.old)" if old else path.name

    def nudge(self) -> None:
        """Something changed that should not wait."""
        self._nudged.set()

    async def run_forever(self) -> None:
        """Copy what changed, every few seconds."""
        failed = False
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), PERIOD_S)
            self._nudged.clear()
            try:
                await asyncio.to_thread(self.update)
                failed = False
            except (ClusterError, OSError, sqlite3.Error) as error:
                if not failed:
                    log.warning("what only this disk holds is not copied now: %s", error)
                failed = True

    def update(self) -> None:
        """Copy what changed since the last time. Blocks.

        Raises:
            ClusterError: it cannot be kept.
        """
        if self._forgotten:
            return
        for name, path in self._files.items():
            with contextlib.suppress(FileNotFoundError):
                changed_s = path.stat().st_mtime
                if self._copied_s.get(name) != changed_s:
                    copy = FileCopy(changed_s=changed_s, text=path.read_text(encoding="utf-8"))
                    self._kept.put(name, copy.model_dump_json().encode())
                    self._copied_s[name] = changed_s
        for day, requests in (self._usage.days() if self._usage.path.exists() else {}).items():
            if self._copied_days.get(day) != requests:
                day_copy = DayCopy(rows=self._usage.rows_of(day), sources=self._usage.sources())
                self._kept.put(f"{_DAY}{day}", day_copy.model_dump_json().encode())
                self._copied_days[day] = requests

    def forget(self) -> None:
        """The end of this bora. Blocks.

        Raises:
            ClusterError: it is still there.
        """
        self._forgotten = True
        self._kept.forget()
