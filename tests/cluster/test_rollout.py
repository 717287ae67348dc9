"""When old replicas go while new ones come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.generations import GenerationKey
from cluster.rollout import Capacity, Incoming, Outgoing, outgoing_targets

OLD = GenerationKey("chat@h100", "1")
OLDER = GenerationKey("chat@h100", "0")


def an_outgoing(**changes: Any) -> Outgoing:
    return Outgoing(**{"target": 2, "running": 2, "ready": 2, **changes})


@pytest.mark.parametrize(
    ("ready", "left"),
    [(0, 2), (1, 1), (2, 0)],
    ids=["none is ready: all stay", "one for one", "all are ready: the last one goes"],
)
def test_old_replicas_go_as_new_ones_are_ready(ready: int, left: int):
    targets = outgoing_targets(
        {OLD: an_outgoing()}, Incoming(ready=Capacity(ready)), promised=Capacity(2)
    )

    assert targets == {OLD: left}


def test_old_replicas_that_do_not_serve_yet_go_at_once():
    old = an_outgoing(target=3, running=1, ready=1)

    assert outgoing_targets({OLD: old}, Incoming(ready=Capacity(0)), promised=Capacity(3)) == {
        OLD: 1
    }


def test_without_room_one_old_replica_goes_first():
    incoming = Incoming(ready=Capacity(0), no_room=True)

    assert outgoing_targets({OLD: an_outgoing()}, incoming, promised=Capacity(2)) == {OLD: 1}


def test_without_room_the_next_one_goes_only_when_the_last_has_freed_its_gpus():
    old = an_outgoing(target=1, running=1, ready=1, stopping=1)

    assert outgoing_targets(
        {OLD: old}, Incoming(ready=Capacity(0), no_room=True), promised=Capacity(2)
    ) == {OLD: 1}


@pytest.mark.parametrize("no_room", [True, False])
def test_nothing_goes_while_new_engines_fail(no_room: bool):
    incoming = Incoming(ready=Capacity(1), failing=True, no_room=no_room)

    assert outgoing_targets({OLD: an_outgoing()}, incoming, promised=Capacity(2)) == {OLD: 2}


def test_an_old_replica_that_made_room_comes_back_when_the_new_version_is_given_up():
    old = an_outgoing(target=1, running=1, ready=1)
    incoming = Incoming(ready=Capacity(0), failing=True, gave_up=True)

    assert outgoing_targets({OLD: old}, incoming, promised=Capacity(2)) == {OLD: 2}


def test_a_generation_that_never_served_is_given_no_replica_back():
    dead = an_outgoing(target=2, running=0, ready=0)

    assert outgoing_targets({OLDER: dead}, Incoming(ready=Capacity(2)), promised=Capacity(2)) == {
        OLDER: 0
    }


def test_generations_go_one_after_another():
    outgoing = {OLDER: an_outgoing(), OLD: an_outgoing()}

    assert outgoing_targets(outgoing, Incoming(ready=Capacity(1)), promised=Capacity(2)) == {
        OLDER: 0,
        OLD: 1,
    }


@given(
    old_ready=st.integers(0, 6),
    new_ready=st.integers(0, 6),
    promised=st.integers(0, 6),
    failing=st.booleans(),
)
def test_with_room_never_fewer_serve_than_promised(
    old_ready: int, new_ready: int, promised: int, failing: bool
):
    old = Outgoing(target=old_ready, running=old_ready, ready=old_ready)

    targets = outgoing_targets(
        {OLD: old}, Incoming(ready=Capacity(new_ready), failing=failing), Capacity(promised)
    )

    before, after = old_ready + new_ready, targets[OLD] + new_ready
    assert after >= min(before, promised)
    if not failing:
        assert after <= max(promised, new_ready)
