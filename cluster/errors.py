"""What can go wrong while acting.

ClusterError
├── ClusterUnreachable   no cluster, controller or gateway answers (exit code 4)
├── EngineFailed         an engine did not start; its last log lines are in the message (5)
├── WeightsMissing       a checkpoint cannot be brought to a node (5)
│   └── HubUnreachable   nothing answers where the model hub should be
├── AdapterFailed        a LoRA adapter could not be loaded; its engine serves on
│   └── EngineSilent     nor said whether it is: it may have it
├── InventoryDiffers     hosts are not what was declared; each lie with its cure is printed (3)
├── StateKept            what a head kept in Redis could not be deleted (4)
├── PortInUse            (2)
└── AlreadyRunning       a bora of this user already runs here (2)
"""

from __future__ import annotations


class ClusterError(Exception):
    """Base of this package's errors. `exit_code` is what the CLI ends with."""

    exit_code = 1


class ClusterUnreachable(ClusterError):
    """Nothing answers where a cluster, controller or gateway should be."""

    exit_code = 4


class EngineFailed(ClusterError):
    """An engine ended before it was ready."""

    exit_code = 5


class WeightsMissing(ClusterError):
    """A checkpoint is neither on this node nor can it be brought there."""

    exit_code = 5


class HubUnreachable(WeightsMissing):
    """No answer, or one of a server in trouble: later it may go."""


class AdapterFailed(ClusterError):
    """An adapter is not there, or the engine refuses it."""


class EngineSilent(AdapterFailed):
    """The engine did not answer: whether it did what it was asked for is unknown."""


class InventoryDiffers(ClusterError):
    """What was planned for is not there."""

    exit_code = 3


class StateKept(ClusterError):
    """A head's state outlived the cluster that was stopped."""

    exit_code = 4


class PortInUse(ClusterError):
    """A port that bora was told to use is taken."""

    exit_code = 2


class AlreadyRunning(ClusterError):
    """Another `bora up` of this user runs on this machine."""

    exit_code = 2
