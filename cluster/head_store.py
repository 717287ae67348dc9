"""What a head keeps in Redis, so that one started anew goes on where it died.

Ray's GCS writes nodes, actors and placement groups there when RAY_REDIS_ADDRESS is set. They outlive
the head on purpose; only who stops the cluster wants them forgotten.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from cluster.errors import StateKept

ADDRESS_VARIABLE = "RAY_REDIS_ADDRESS"
NAMESPACE_VARIABLE = "RAY_external_storage_namespace"
_NAMESPACE = "default"  # Ray's own
_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class HeadStore:
    """One cluster's part of a Redis server."""

    host: str
    port: int
    username: str
    password: str
    encrypted: bool
    namespace: str

    def forget(self) -> None:
        """Delete all that the GCS has written; it must have ended.

        In a process of its own, because Ray ends the one in which Redis does not answer it.

        Raises:
            StateKept: it is still there.
        """
        try:
            socket.create_connection((self.host, self.port), _CONNECT_S).close()
        except OSError as error:  # Ray would try for a minute
            raise self._kept(str(error)) from error
        done = subprocess.run(
            [sys.executable, "-m", "cluster.head_store"],
            input=json.dumps(asdict(self)),  # no argument: others can read those
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise self._kept(f"status {done.returncode}; does it refuse the password?")

    def _kept(self, why: str) -> StateKept:
        return StateKept(
            f"Redis at {self.host}:{self.port} could not be told to forget the cluster ({why}), "
            f"and the next head would take up what was just stopped: `ray down` again once it "
            f"answers, or delete its keys RAY{self.namespace}@* there"
        )


def is_kept() -> bool:
    """Whether a head that is started from this process has such a store."""
    return bool(os.environ.get(ADDRESS_VARIABLE))


def store_of(command: Sequence[str], environment: Mapping[str, str]) -> HeadStore | None:
    """The one of a GCS, by its command line and environment; None: it has none."""
    options = dict(each.lstrip("-").partition("=")[::2] for each in command)
    host, port = options.get("redis_address", ""), options.get("redis_port", "")
    if not host or not port.isdecimal():
        return None
    return HeadStore(
        host=host,
        port=int(port),
        username=options.get("redis_username", ""),
        password=options.get("redis_password", ""),
        encrypted=options.get("redis_enable_ssl", "").lower() == "true",
        namespace=environment.get(NAMESPACE_VARIABLE, _NAMESPACE),
    )


def main() -> int:
    """Forget the store whose fields stand on stdin as JSON."""
    from ray._private.gcs_utils import cleanup_redis_storage  # noqa: PLC0415 - takes a second

    store = HeadStore(**json.load(sys.stdin))
    cleanup_redis_storage(
        store.host, store.port, store.password, store.encrypted, store.namespace, store.username
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
