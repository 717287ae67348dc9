"""What a head keeps in Redis, so that one started anew goes on where it died.

Ray's GCS writes nodes, actors and placement groups there when RAY_REDIS_ADDRESS is set. They outlive
the head on purpose; only who stops the cluster wants them forgotten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ADDRESS_VARIABLE = "RAY_REDIS_ADDRESS"
NAMESPACE_VARIABLE = "RAY_external_storage_namespace"
_NAMESPACE = "default"  # Ray's own


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
        """Delete all that the GCS has written; it must have ended."""
        from ray._private.gcs_utils import cleanup_redis_storage  # noqa: PLC0415 - takes a second

        cleanup_redis_storage(
            self.host, self.port, self.password, self.encrypted, self.namespace, self.username
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
