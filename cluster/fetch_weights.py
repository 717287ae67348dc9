"""Fetch a checkpoint: `python -m cluster.fetch_weights ORDER`, a process of its own.

Downloading and comparing several gigabytes a second would hold up the replica's event loop. What it
does stands in lines that begin with `weights: `; the last of them has the folder, or what is wrong.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster.cache_limits import CacheLimits
from cluster.errors import WeightsMissing
from cluster.model_cache import ModelCache, Wanted
from cluster.weight_files import CheckpointFormat
from placement.model_cache import ModelCacheSpec
from placement.spec import Spec

TELLS = "weights: "
FOUND = "are in "


class FetchOrder(Spec):
    """What to fetch, as JSON. `folder`: instead of the host's cache."""

    repo: str
    revision: str
    commit: str = ""
    checkpoint_format: CheckpointFormat = "hf"
    precision: str = ""
    cache: ModelCacheSpec = ModelCacheSpec()
    folder: Path | None = None

    @property
    def wanted(self) -> Wanted:
        """As the cache takes it."""
        return Wanted(self.repo, self.revision, self.commit, self.checkpoint_format, self.precision)


def fetch(order: FetchOrder) -> Path:
    """Do it in this process; `$HF_HUB_OFFLINE` is obeyed.

    Raises:
        WeightsMissing: it cannot be had.
    """
    from cluster.hub import Hub  # noqa: PLC0415 - imports huggingface_hub

    offline = order.cache.offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    cache = ModelCache(
        order.folder, hub=None if offline else Hub(), limits=CacheLimits.of(order.cache)
    )
    return cache.fetch(order.wanted, _tell)


def main() -> int:
    """The exit status."""
    order = FetchOrder.model_validate_json(sys.argv[1])
    try:
        _tell(f"{FOUND}{fetch(order)}")
    except WeightsMissing as error:
        _tell(str(error).replace("\n", " "))
        return 1
    return 0


def _tell(text: str) -> None:
    print(f"{TELLS}{text}", flush=True)  # noqa: T201 - read by who started this


if __name__ == "__main__":
    sys.exit(main())
