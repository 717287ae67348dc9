"""UsageStore: a SQLite file with what tenants used, written by several processes."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

from gateway.ledger import Period, UsageReport, UsageRow, period_of
from gateway.tenants import Tenant

_BUSY_S = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
  tenant TEXT NOT NULL, model TEXT NOT NULL, day TEXT NOT NULL,
  requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
  completion_tokens INTEGER NOT NULL, estimated_tokens INTEGER NOT NULL,
  PRIMARY KEY (tenant, day, model)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reports (
  source TEXT PRIMARY KEY, sequence INTEGER NOT NULL, day TEXT NOT NULL) WITHOUT ROWID;
"""
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (tenant, day, model) DO UPDATE SET
  requests = requests + excluded.requests,
  prompt_tokens = prompt_tokens + excluded.prompt_tokens,
  completion_tokens = completion_tokens + excluded.completion_tokens,
  estimated_tokens = estimated_tokens + excluded.estimated_tokens
"""
# Of two tellings of the same sum the larger one is the later one.
_MERGE = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (tenant, day, model) DO UPDATE SET
  requests = MAX(requests, excluded.requests),
  prompt_tokens = MAX(prompt_tokens, excluded.prompt_tokens),
  completion_tokens = MAX(completion_tokens, excluded.completion_tokens),
  estimated_tokens = MAX(estimated_tokens, excluded.estimated_tokens)
"""
_MERGE_SOURCE = """
INSERT INTO reports VALUES (?, ?, date('now')) ON CONFLICT (source) DO UPDATE SET
  sequence = MAX(sequence, excluded.sequence)
"""
Grouping = Literal["tenant", "model", "day"]
_KEPT_SOURCES_DAYS = "-30 days"


def usage_file(key_file: Path) -> Path:
    """Where the usage of a key file's tenants is kept: next to it."""
    return key_file.with_suffix(".usage.sqlite")


class UsageStore:
    """Opened anew for each call, so that it may be used from any thread. Raises `sqlite3.Error`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        """Make the file, readable by its owner only, and its tables.

        Raises:
            OSError: the folder cannot be written.
            sqlite3.Error: the file is none of SQLite.
        """
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        with closing(self._open()) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(_SCHEMA)

    def add(self, rows: Sequence[UsageRow]) -> None:
        """Add these; all or none."""
        if rows:
            with closing(self._open()) as database, database:
                database.executemany(_ADD, [_values(row) for row in rows])

    def add_report(self, report: UsageReport) -> bool:
        """Add a report's rows, unless that was done before; returns whether it was done now."""
        with closing(self._open()) as database, database:
            database.execute("BEGIN IMMEDIATE")
            found = database.execute(
                "SELECT sequence FROM reports WHERE source = ?", (report.source,)
            ).fetchone()
            if found is not None and report.sequence <= found[0]:
                return False
            database.execute(
                "INSERT OR REPLACE INTO reports VALUES (?, ?, date('now'))",
                (report.source, report.sequence),
            )
            database.execute(
                "DELETE FROM reports WHERE day < date('now', ?)", (_KEPT_SOURCES_DAYS,)
            )
            database.executemany(_ADD, [_values(row) for row in report.rows])
        return True

    def spent(self, tenants: Iterable[Tenant], wall: float) -> dict[str, tuple[str, int]]:
        """Each tenant's present period and what it has used in it.

        Only of those with a budget: nobody asks for the others.
        """
        limited = [tenant for tenant in tenants if tenant.budget_tokens is not None]
        if not limited:
            return {}
        with closing(self._open()) as database:
            return {
                tenant.name: _spent(database, tenant.name, tenant.budget_period, wall)
                for tenant in limited
            }

    def totals(
        self, *, since: str = "", by: Sequence[Grouping] = ("tenant",)
    ) -> list[dict[str, str | int]]:
        """Sums from the day `since` on, for every value of the columns `by`; others read `*`."""
        names = ("tenant", "model", "day")
        chosen = [name if name in by else "'*'" for name in names]
        grouped = ", ".join(name for name in names if name in by)
        query = (
            f"SELECT {', '.join(chosen)}, SUM(requests), SUM(prompt_tokens),"  # noqa: S608 - our own names
            " SUM(completion_tokens), SUM(estimated_tokens) FROM usage WHERE day >= ?"
            f" GROUP BY {grouped} ORDER BY {grouped}"
        )
        with closing(self._open()) as database:
            return [
                dict(zip(UsageRow.model_fields, values, strict=True))
                for values in database.execute(query, (since,))
            ]

    def days(self) -> dict[str, int]:
        """Requests of each day: a sum that changes whenever anything of the day does."""
        with closing(self._open()) as database:
            return dict(database.execute("SELECT day, SUM(requests) FROM usage GROUP BY day"))

    def rows_of(self, day: str) -> tuple[UsageRow, ...]:
        """What was used on that day."""
        with closing(self._open()) as database:
            found = database.execute("SELECT * FROM usage WHERE day = ?", (day,))
            return tuple(
                UsageRow.model_validate(dict(zip(UsageRow.model_fields, values, strict=True)))
                for values in found
            )

    def sources(self) -> dict[str, int]:
        """The last report that was counted of each source."""
        with closing(self._open()) as database:
            return dict(database.execute("SELECT source, sequence FROM reports"))

    def merge(self, rows: Sequence[UsageRow], sources: Mapping[str, int]) -> None:
        """Take in what another copy of this file holds, as far as it is later."""
        with closing(self._open()) as database, database:
            database.executemany(_MERGE, [_values(row) for row in rows])
            database.executemany(_MERGE_SOURCE, list(sources.items()))

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=_BUSY_S)


def _values(row: UsageRow) -> tuple[str | int, ...]:
    return (
        *(row.tenant, row.model, row.day, row.requests),
        *(row.prompt_tokens, row.completion_tokens, row.estimated_tokens),
    )


def _spent(
    database: sqlite3.Connection, tenant: str, period: Period, wall: float
) -> tuple[str, int]:
    now = period_of(wall, period)
    [tokens] = database.execute(
        "SELECT COALESCE(SUM(prompt_tokens + completion_tokens), 0) FROM usage"
        " WHERE tenant = ? AND day >= ?",
        (tenant, now if period == "day" else f"{now}-01"),
    ).fetchone()
    return now, tokens
