"""KeyStore: tenants, the hashes of their keys, and their usage, in two files that belong together."""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.files import replace_private
from cluster.key_messages import CreateKeyRequest, NewKey, UsageTotal, UsageTotals
from gateway.ledger import Spent, UsageReport
from gateway.tenants import KeyFile, StoredKey, Tenant, digest_of, new_key
from gateway.usage_store import Grouping, UsageStore, usage_file
from placement.errors import ConfigError, UnknownName
from placement.spec import dump_yaml, load_yaml


class KeyStore:
    """`path` is the key file; it need not exist yet. For one thread at a time.

    Every call raises `ConfigError` when a file cannot be read or written, or is none of ours.
    """

    def __init__(
        self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.path = path
        self._now = now
        self._usage = UsageStore(usage_file(path))

    def tenants(self) -> tuple[Tenant, ...]:
        """All of them, in the order of their making."""
        return load_yaml(self.path, KeyFile).tenants if self.path.exists() else ()

    def create(self, request: CreateKeyRequest) -> NewKey:
        """Make a key; for a tenant that exists one more, with its settings changed where given.

        Raises:
            ConfigError: a setting makes no sense.
        """
        key = new_key()
        stored = StoredKey(sha256=digest_of(key), created=self._now())
        with self._changing() as tenants:
            old = tenants.get(request.tenant)
            keys = (*(old.keys if old else ()), stored)
            tenants[request.tenant] = _with_settings(old, request, keys)
        return NewKey(tenant=request.tenant, id=stored.id, key=key)

    def revoke(self, name: str) -> tuple[str, ...]:
        """Take a tenant away with all its keys, or one key by its id; returns the ids that are gone.

        Raises:
            UnknownName: there is neither.
        """
        with self._changing() as tenants:
            if name in tenants:
                return tuple(key.id for key in tenants.pop(name).keys)
            for tenant in tenants.values():
                kept = tuple(key for key in tenant.keys if key.id != name)
                if len(kept) < len(tenant.keys):
                    tenants[tenant.name] = tenant.model_copy(update={"keys": kept})
                    return (name,)
            known = {key.id for tenant in tenants.values() for key in tenant.keys}
            raise UnknownName("tenant or key", name, {*tenants, *known})

    def prepare_usage(self) -> None:
        """Make the usage file if there is none."""
        with self._told(self._usage.path):
            self._usage.prepare()

    def add_usage(self, report: UsageReport) -> None:
        """Count a gateway's report, unless it was counted before."""
        with self._told(self._usage.path):
            self._usage.add_report(report)

    def spent(self, tenants: Sequence[Tenant]) -> dict[str, Spent]:
        """What those with a budget have used in their present period."""
        with self._told(self._usage.path):
            found = self._usage.spent(tenants, self._now().timestamp())
        return {
            name: Spent(period=period, tokens=tokens) for name, (period, tokens) in found.items()
        }

    def usage(self, since: str, by: Sequence[Grouping]) -> UsageTotals:
        """Sums from the day `since` on."""
        self.prepare_usage()
        with self._told(self._usage.path):
            rows = self._usage.totals(since=since, by=by)
        return UsageTotals(since=since, rows=tuple(UsageTotal.model_validate(row) for row in rows))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Tenant]]:
        """The tenants by name; what is done to them is written at the end, unless it raises."""
        with self._told(self.path), self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tenants = {tenant.name: tenant for tenant in self.tenants()}
            yield tenants
            replace_private(self.path, dump_yaml(KeyFile(tenants=tuple(tenants.values()))))

    @contextlib.contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror}; give a file that you may write"
            ) from error
        except sqlite3.Error as error:
            raise ConfigError(
                f"{path}: {error}; it keeps the usage of the keys beside it"
            ) from error


def _with_settings(
    old: Tenant | None, request: CreateKeyRequest, keys: tuple[StoredKey, ...]
) -> Tenant:
    before: dict[str, Any] = old.model_dump() if old else {}
    try:
        return Tenant.model_validate(
            {**before, **request.settings, "name": request.tenant, "keys": keys}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(
            f"tenant {request.tenant!r}: {where}: {problem['msg']}, got {problem['input']!r}"
        ) from None
