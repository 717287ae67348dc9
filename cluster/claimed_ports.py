"""Ports that are given to one engine at a time, although it listens there only seconds later.

A rank of a gang that starts imports for half a minute before it listens where the others meet. Were
another gang of this host given the same port meanwhile, its ranks could meet those of the first one.
So who is given a port holds a lock on a file of that name.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import free_ports


@dataclass(slots=True)
class ClaimedPorts:
    """Nobody else is given these ports while this process lives and holds `files`."""

    ports: tuple[int, ...]
    files: tuple[int, ...]

    def let_go(self) -> None:
        """Others may be given them."""
        for file in self.files:
            os.close(file)
        self.files = ()


def claim_ports(
    count: int,
    host: str,
    folder: Path | None = None,
    free: Callable[[int, str], list[int]] = free_ports,
) -> ClaimedPorts:
    """`count` of the ports that are `free` on `host`, an address of this machine.

    Raises:
        OSError: there are none, or the folder of the locks cannot be written.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"bora-ports-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    claimed = ClaimedPorts((), ())
    while len(claimed.ports) < count:
        for port in free(count - len(claimed.ports), host):
            file = os.open(folder / f"{port}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
            else:
                claimed.ports = (*claimed.ports, port)
                claimed.files = (*claimed.files, file)
    return claimed
