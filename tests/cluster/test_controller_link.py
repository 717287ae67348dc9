"""Tests of ControllerLink: what a replica does while nobody answers for the controller."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from cluster.controller_link import ControllerLink
from cluster.messages import Orders


class Controller:
    """Answers `report.remote`, or fails as a handle does whose actor has ended."""

    def __init__(self, answer: Orders | None = None, error: Exception | None = None) -> None:
        self.heard: list[str] = []
        self.report = self
        self._answer, self._error = answer, error

    async def remote(self, text: str) -> Orders | None:
        self.heard.append(text)
        if self._error is not None:
            raise self._error
        return self._answer


class Directory:
    """Looks the controller up: each time the next of `found`; None never comes."""

    def __init__(self, *found: Controller | Exception | None) -> None:
        self.asked = 0
        self.closed = threading.Event()
        self._found = list(found)

    def __call__(self) -> Any:
        self.asked += 1
        found = self._found.pop(0)
        if found is None:
            self.closed.wait()
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def stuck() -> Iterator[Directory]:
    """Its first look-up never ends, as Ray's may when the head goes."""
    directory = Directory(None, Controller(answer=Orders(retire_within_s=7.0)))
    yield directory
    directory.closed.set()


async def test_the_controller_is_looked_up_once():
    controller = Controller(answer=Orders(retire_within_s=3.0))
    directory = Directory(controller)
    link = ControllerLink(directory)

    assert [await link.report("one"), await link.report("two")] == 2 * [Orders(retire_within_s=3.0)]
    assert directory.asked == 1
    assert controller.heard == ["one", "two"]


async def test_a_controller_that_ended_is_looked_up_again():
    gone = Controller(error=ray.exceptions.RayActorError())
    link = ControllerLink(Directory(gone, Controller(answer=Orders(retire_within_s=1.0))))

    with pytest.raises(ray.exceptions.RayActorError):
        await link.report("lost")

    assert await link.report("heard") == Orders(retire_within_s=1.0)


async def test_a_look_up_that_fails_is_told_and_tried_again():
    link = ControllerLink(
        Directory(OSError("no head"), Controller(answer=Orders(retire_within_s=1.0)))
    )

    with pytest.raises(OSError, match="no head"):
        await link.report("lost")

    assert await link.report("heard") == Orders(retire_within_s=1.0)


async def test_a_look_up_that_hangs_holds_nobody_up_and_is_not_begun_again(stuck: Directory):
    link = ControllerLink(stuck, call_s=0.05)

    for _ in range(3):
        with pytest.raises(TimeoutError):
            await link.report("nobody listens")

    assert stuck.asked == 1


async def test_a_look_up_that_hangs_for_long_is_given_up_for_another(stuck: Directory):
    link = ControllerLink(stuck, call_s=0.05, stuck_s=0.01)

    with pytest.raises(TimeoutError):
        await link.report("nobody listens")

    assert await link.report("heard") == Orders(retire_within_s=7.0)
