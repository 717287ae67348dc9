"""What a head loses with its disk, and what it finds again where Ray's state outlives it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.context import Context, save_where_missing
from cluster.errors import ClusterError
from cluster.head_copy import PLAN, HeadCopy
from cluster.key_messages import CreateKeyRequest
from cluster.key_store import KeyStore
from gateway.ledger import UsageReport, UsageRow
from gateway.tenants import KeyRing
from gateway.usage_store import UsageStore, usage_file

GATEWAY = "gateway-1"


@dataclass
class Values:
    """They outlive every head."""

    kept: dict[str, bytes] = field(default_factory=dict)
    refuses: bool = False

    def get(self, name: str) -> bytes | None:
        return self.kept.get(name)

    def put(self, name: str, value: bytes) -> None:
        if self.refuses:
            raise ClusterError("no answer")
        self.kept[name] = value

    def names(self) -> list[str]:
        return list(self.kept)

    def forget(self) -> None:
        self.kept.clear()


class Head:
    """A head with a disk of its own, which serves a plan."""

    def __init__(self, disk: Path, values: Values, plan: str = "") -> None:
        self.plan = disk / "run" / "plan.yaml"
        self.plan.parent.mkdir(parents=True)
        if plan:
            self.plan.write_text(plan)
        self.store = KeyStore(disk / "keys.yaml")
        self.usage = UsageStore(usage_file(self.store.path))
        self.copy = HeadCopy({PLAN: self.plan, "keys": self.store.path}, self.usage, values)

    def uses(self, sequence: int, tokens: int, day: str = "2026-11-22") -> None:
        """A gateway tells of one request of `acme`."""
        row = UsageRow(tenant="acme", model="chat", day=day, requests=1, prompt_tokens=tokens)
        self.store.prepare_usage()
        self.store.add_usage(UsageReport(source=GATEWAY, sequence=sequence, rows=(row,)))

    def used(self) -> list[tuple[str, int, int]]:
        totals = self.usage.totals(by=("tenant", "day"))
        return [(str(t["day"]), int(t["requests"]), int(t["prompt_tokens"])) for t in totals]


def a_key(head: Head, tenant: str = "acme") -> str:
    return head.store.create(CreateKeyRequest(tenant=tenant, settings={"budget_tokens": 900})).key


def names(head: Head) -> list[str]:
    return [tenant.name for tenant in head.store.tenants()]


def test_a_head_without_its_disk_knows_plan_keys_limits_and_usage(tmp_path: Path):
    values = Values()
    first = Head(tmp_path / "first", values, plan="the plan")
    key = a_key(first)
    first.uses(1, tokens=100, day="2026-11-21")
    first.uses(2, tokens=300)
    first.copy.update()

    second = Head(tmp_path / "second", values)
    told = second.copy.restore()

    assert second.plan.read_text() == "the plan"
    tenant = KeyRing(second.store.tenants()).find(key)
    assert tenant is not None
    assert tenant.budget_tokens == 900
    assert second.used() == first.used() == [("2026-11-21", 1, 100), ("2026-11-22", 1, 300)]
    assert told == ["plan.yaml", "keys.yaml", "usage of 2 days"]
    assert {path.stat().st_mode & 0o777 for path in (second.store.path, second.usage.path)} == {
        0o600
    }


def test_no_key_of_a_client_is_copied(tmp_path: Path):
    values = Values()
    head = Head(tmp_path, values, plan="the plan")
    key = a_key(head)

    head.copy.update()

    assert not [name for name, value in values.kept.items() if key.encode() in value]


def test_a_report_that_was_counted_before_the_loss_is_not_counted_again(tmp_path: Path):
    values = Values()
    first = Head(tmp_path / "first", values, plan="the plan")
    first.uses(7, tokens=100)
    first.copy.update()

    second = Head(tmp_path / "second", values)
    second.copy.restore()
    second.uses(7, tokens=100)
    second.uses(8, tokens=50)

    assert second.used() == [("2026-11-22", 2, 150)]


def test_an_old_disk_that_comes_back_does_not_revive_keys_that_were_revoked_since(tmp_path: Path):
    values = Values()
    old = Head(tmp_path / "old", values, plan="the plan")
    a_key(old, "acme")
    a_key(old, "left")
    old.uses(1, tokens=100)
    old.copy.update()
    other = Head(tmp_path / "other", values)
    other.copy.restore()
    other.store.revoke("left")
    os.utime(other.store.path, (2e9, 2e9))
    other.uses(2, tokens=300)
    other.copy.update()

    told = old.copy.restore()

    assert names(old) == ["acme"]
    assert "left" in old.store.path.with_suffix(".old").read_text()
    assert told == ["keys.yaml, older on this disk (now keys.old)"]
    assert old.used() == other.used() == [("2026-11-22", 2, 400)]


def test_a_newer_file_is_never_replaced_by_an_older_copy(tmp_path: Path):
    values = Values()
    head = Head(tmp_path, values, plan="the plan")
    a_key(head, "acme")
    head.uses(1, tokens=100)
    head.copy.update()
    a_key(head, "later")
    head.uses(2, tokens=100)
    os.utime(head.store.path, (2e9, 2e9))

    assert head.copy.restore() == []

    assert names(head) == ["acme", "later"]
    assert head.used() == [("2026-11-22", 2, 200)]


def test_only_what_changed_is_copied_again(tmp_path: Path):
    values = Values()
    head = Head(tmp_path, values, plan="the plan")
    a_key(head)
    head.uses(1, tokens=100, day="2026-11-21")
    head.copy.update()
    values.kept.clear()

    head.copy.update()
    assert values.names() == []
    head.uses(2, tokens=1)
    head.copy.update()

    assert values.names() == ["usage/2026-11-22"]


def test_what_was_stopped_leaves_nothing_that_a_later_head_would_take_up(tmp_path: Path):
    values = Values()
    head = Head(tmp_path / "first", values, plan="the plan")
    a_key(head)
    head.copy.update()

    head.copy.forget()
    head.copy.update()

    assert values.names() == []
    second = Head(tmp_path / "second", values)
    assert second.copy.restore() == []
    assert names(second) == []


async def test_a_change_is_copied_at_once_and_a_copy_that_failed_later(tmp_path: Path):
    values = Values(refuses=True)
    head = Head(tmp_path, values, plan="the plan")
    running = asyncio.create_task(head.copy.run_forever())
    try:
        head.copy.nudge()
        await asyncio.sleep(0.1)
        assert values.names() == []
        values.refuses = False
        head.copy.nudge()
        async with asyncio.timeout(30):
            while PLAN not in values.names():
                await asyncio.sleep(0.01)
    finally:
        running.cancel()


def test_the_context_is_written_only_where_it_is_missing(tmp_path: Path):
    def found(token: str) -> Context:
        return Context(run_dir=str(tmp_path / "state" / "run"), token=token)

    assert save_where_missing(found("of the cluster"))
    assert not save_where_missing(found("another"))

    file = tmp_path / "state" / "context.json"
    assert Context.model_validate_json(file.read_text()).token == "of the cluster"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("tokens", [5, 0])
def test_of_two_copies_of_a_sum_the_later_one_counts(tmp_path: Path, tokens: int):
    usage = UsageStore(tmp_path / "usage.sqlite")
    usage.prepare()
    row = UsageRow(tenant="a", model="m", day="2026-11-22", requests=2, prompt_tokens=3)
    usage.merge([row], {"gateway-1": 4})

    usage.merge([row.model_copy(update={"prompt_tokens": tokens})], {"gateway-1": tokens})

    assert usage.rows_of("2026-11-22") == (
        row.model_copy(update={"prompt_tokens": max(3, tokens)}),
    )
    assert usage.sources() == {"gateway-1": max(4, tokens)}
