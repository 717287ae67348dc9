"""Changes of the endpoint table, told together when many come at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cluster.publishing import Publisher
from cluster.sync_desk import SyncDesk
from gateway.endpoints import EndpointTable, ServedModel


class Fleet:
    """A table with as many models as `size`; counts how often it was made."""

    def __init__(self, tmp_path: Path, pause_s: float) -> None:
        self.desk = SyncDesk(tmp_path, lambda: False)
        self.size = self.made = 0
        self.publisher = Publisher(self.desk, self._table, pause_s)

    def _table(self, version: int, changed_s: float) -> EndpointTable:
        self.made += 1
        models = tuple(ServedModel(name=f"m{number}") for number in range(self.size))
        return EndpointTable(version=version, models=models, changed_s=changed_s)

    def grow(self) -> None:
        self.size += 1
        self.publisher.changed()


async def test_the_first_change_after_a_quiet_while_is_told_at_once(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, pause_s=60.0)

    fleet.grow()

    assert len(fleet.desk.table.models) == 1


async def test_changes_within_the_pause_are_told_as_one(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, pause_s=0.05)

    for _ in range(100):
        fleet.grow()
    while len(fleet.desk.table.models) < 100:
        await asyncio.sleep(0.01)

    assert fleet.made == 2


async def test_a_table_tells_when_the_first_of_its_changes_was_heard_of(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, pause_s=0.05)

    fleet.grow()
    first = fleet.desk.table
    fleet.grow()
    while fleet.desk.table is first:
        await asyncio.sleep(0.01)

    second = fleet.desk.table
    assert second.version > first.version
    assert first.changed_s <= second.changed_s < second.version / 1000


async def test_what_routes_alike_is_not_told(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, pause_s=0.0)
    fleet.grow()
    version = fleet.desk.table.version

    fleet.publisher.changed()

    assert fleet.desk.table.version == version


async def test_versions_grow_also_within_a_millisecond(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, pause_s=0.0)
    versions = []

    for _ in range(50):
        fleet.grow()
        versions.append(fleet.desk.table.version)

    assert versions == sorted(set(versions))
