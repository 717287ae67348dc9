"""Priority: engines and replicas run at that of the shell that started Ray, what steers them before.

Each Ray worker adds `RAY_worker_niceness`, by default 15, to its own niceness, and what it starts
inherits that: beside anything else on its host an engine would get a thirtieth of the CPU that it
asks for. The variable counts in the environment of `ray start`; only root could take it back later.

An engine that starts takes every core for a while (imports, kernels that are compiled, weights).
Controller, gateways and on clusters Ray's own processes need little, but at once: streams wait for
them, and replicas that died.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

VARIABLE = "RAY_worker_niceness"
NORMAL_PRIORITY = {VARIABLE: "0"}
STEERING_NICENESS = -10
# One process for all hosts, busiest just when all of them start engines.
CONTROLLER_NICENESS = -20

log = logging.getLogger("bora.priority")


def ahead_of_workers() -> dict[str, str]:
    """Put this process, and the Ray node that it will start, before engines; with what environment.

    A raylet whose agents take more than 15 s to start ends, and one that answers no health check in
    time is taken for dead, both because engines of its own host start. Workers come back to where
    this process was.
    """
    was = os.nice(0)
    return {VARIABLE: str(was - STEERING_NICENESS)} if outrank_engines() else NORMAL_PRIORITY


def outrank_engines(pid: int | None = None, niceness: int = STEERING_NICENESS) -> bool:
    """Put a process, or this one, before engines, with all threads and what it will start.

    Only root may, or who has `CAP_SYS_NICE` or a `LimitNICE`. False: not allowed, nothing changed.
    """
    threads = Path("/proc") / str(pid or os.getpid()) / "task"
    try:
        for thread in threads.iterdir():  # Linux keeps a niceness for each
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)
    except PermissionError:
        log.info("not allowed to run at niceness %d", niceness)
        return False
    return True
