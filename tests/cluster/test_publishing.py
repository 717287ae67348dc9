"""Changes of the endpoint table, told together when many come at once."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from cluster.publishing import Publisher
from cluster.sync_desk import SyncDesk, SyncText
from gateway.endpoints import EndpointTable, ServedModel, SyncRequest, SyncResponse


class Fleet:
    """A table with as many models as `size`; counts how often it was made."""

    def __init__(self, tmp_path: Path, pause_s: float) -> None:
        self.desk = SyncDesk(tmp_path, lambda: False)
        self.size = self.made = 0
        self.publisher = Publisher(self.desk, self._table, pause_s)

    def _table(self, version: int) -> EndpointTable:
        self.made += 1
        models = tuple(ServedModel(name=f"m{number}") for number in range(self.size))
        return EndpointTable(version=version, models=models)

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


async def ask(fleet: Fleet, version: int) -> SyncResponse:
    return await fleet.desk.answer(SyncRequest(gateway="g", version=version, wait_s=0.0))


async def test_a_gateway_hears_when_the_first_of_the_changes_was_heard_of(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, pause_s=0.05)

    fleet.grow()
    first = fleet.desk.table.version
    began_s = time.time()
    fleet.grow()
    grown_s = time.time()
    while fleet.desk.table.version == first:
        await asyncio.sleep(0.01)

    second = await ask(fleet, first)
    assert second.table is not None
    assert second.table.version > first
    assert began_s <= second.changed_s <= grown_s


async def test_a_gateway_that_missed_tables_hears_of_the_oldest_change_that_it_lacks(
    tmp_path: Path,
) -> None:
    desk = SyncDesk(tmp_path, lambda: False)
    fleet = Fleet(tmp_path, pause_s=0.0)
    fleet.desk = desk
    for number in range(1, 5):
        models = tuple(ServedModel(name=f"m{each}") for each in range(number))
        desk.publish(EndpointTable(version=number, models=models), changed_s=100.0 + number)

    assert (await ask(fleet, 1)).changed_s == 102.0
    assert (await ask(fleet, 3)).changed_s == 104.0
    assert (await ask(fleet, 4)).changed_s == 0.0  # it lacks nothing
    assert (await ask(fleet, -1)).changed_s == 0.0  # it was not there


async def test_a_table_is_text_once_and_says_the_same_to_all(tmp_path: Path) -> None:
    fleet, text = Fleet(tmp_path, pause_s=0.0), SyncText()
    for version in (-1, 1):
        fleet.grow()
        answer = await ask(fleet, version)

        assert SyncResponse.model_validate_json(text.of(answer)) == answer
        again = answer.model_copy(update={"usage_sequence": 7})
        assert SyncResponse.model_validate_json(text.of(again)) == again
    nothing = SyncResponse()
    assert SyncResponse.model_validate_json(text.of(nothing)) == nothing


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
