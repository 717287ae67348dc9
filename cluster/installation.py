"""Puts bora on the Ray cluster of `bora up`, from a process of its own.

    BORA_INSTALLATION=JSON python -m cluster.installation

`bora up` must end cleanly at any moment, and a process in which a Ray driver is at work cannot: the
driver sets signal handlers of its own, and aborts the process when its cluster ends under it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import ClusterError
from cluster.processes import start_guarded, stop_guarded, tail
from placement.fleet import GatewaySpec
from placement.spec import Spec

_VARIABLE = "BORA_INSTALLATION"


class Installation(Spec):
    """What `bootstrap.start` is told, and the GCS address (HOST:PORT) of the cluster."""

    address: str
    run_dir: Path
    token: str
    host: str
    control_port: int
    gateway: GatewaySpec


def install(wanted: Installation, env: Mapping[str, str]) -> None:
    """Start controller and gateway there; `env` lets Ray find the cluster's token.

    Raises:
        ClusterError: they did not start; the end of the output is in the message.
    """
    log = wanted.run_dir / "logs" / "installation.log"
    process = start_guarded(
        [sys.executable, "-m", "cluster.installation"],
        log=log,
        env={**env, _VARIABLE: wanted.model_dump_json()},
        grace_s=0.2,  # nothing of it is worth waiting for: the cluster ends with it
    )
    try:
        status = process.wait()
    finally:
        stop_guarded(process)
    if status:
        raise ClusterError(f"bora did not start on Ray; the end of {log}:\n{tail(log, 30)}")


def _main() -> None:
    from cluster import bootstrap  # noqa: PLC0415 - takes a second, which `bora up` is spared

    wanted = Installation.model_validate_json(os.environ.pop(_VARIABLE))
    bootstrap.connect(wanted.address)
    bootstrap.start(
        run_dir=wanted.run_dir,
        token=wanted.token,
        control=(wanted.host, wanted.control_port),
        gateway=wanted.gateway,
        engine_host=wanted.host,
    )
    bootstrap.disconnect()


if __name__ == "__main__":
    _main()
