"""GcsValues: values in Ray's GCS, where Serve keeps its own state; with Redis they outlive the head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from cluster.calibration_file import CALIBRATION_FILE
from cluster.errors import ClusterError
from cluster.head_copy import PLAN, PLAN_FILE, HeadCopy
from cluster.head_store import is_kept
from cluster.key_keeper import KEY_FILE
from gateway.usage_store import UsageStore, usage_file

T = TypeVar("T")


def copy_of_head(run_dir: Path) -> HeadCopy | None:
    """Of what lies in `run_dir` and in the state folder above it; None: Ray's state is not kept."""
    if not is_kept():
        return None
    keys = run_dir.parent / KEY_FILE
    calibration = run_dir.parent / CALIBRATION_FILE
    files = {PLAN: run_dir / PLAN_FILE, "keys": keys, "calibration": calibration}
    return HeadCopy(files, UsageStore(usage_file(keys)), GcsValues())


class GcsValues:
    """`cluster.head_copy.KeyValues` for the cluster that this process has joined."""

    def __init__(self) -> None:
        self._client = GcsClient(address=ray.get_runtime_context().gcs_address)
        self._options: dict[str, Any] = {"namespace": b"bora", "timeout": 5.0}

    def get(self, name: str) -> bytes | None:
        """None: there is none."""
        found: bytes | None = _answer(
            lambda: self._client.internal_kv_get(name.encode(), **self._options)
        )
        return found

    def put(self, name: str, value: bytes) -> None:
        """Keep it instead of what was there."""
        put = self._client.internal_kv_put
        _answer(lambda: put(name.encode(), value, overwrite=True, **self._options))

    def names(self) -> list[str]:
        """All that are kept."""
        found = _answer(lambda: self._client.internal_kv_keys(b"", **self._options))
        return [name.decode() for name in found]

    def forget(self) -> None:
        """All of them."""
        _answer(lambda: self._client.internal_kv_del(b"", True, **self._options))  # by prefix


def _answer(ask: Callable[[], T]) -> T:
    try:
        return ask()
    except ray.exceptions.RayError as error:
        raise ClusterError(f"Ray's GCS does not keep bora's state: {error}") from error
