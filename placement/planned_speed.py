"""What a variant's speed was predicted from, so that its engines can be held against it."""

from __future__ import annotations

from placement.costs import ReplicaSpeed
from placement.setups import SpeedSetup
from placement.spec import Spec


class PlannedSpeed(Spec):
    """A replica's costs, corrected by what engines of its setup were seen to do before."""

    setup: SpeedSetup
    costs: ReplicaSpeed
