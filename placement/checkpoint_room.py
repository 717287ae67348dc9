"""How much disk a plan's weights need on the nodes of each pool."""

from __future__ import annotations

import re
from collections.abc import Mapping

from placement.catalogue import Catalogue
from placement.errors import UnknownName
from placement.plan import Plan, Variant

SIM_FETCH = "--sim-fetch-weights"  # has a simulated engine fetch what a real one would
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def checkpoint_bytes(plan: Plan, catalogue: Catalogue) -> dict[str, dict[str, int]]:
    """By pool, bytes of each Hugging Face repository that engines there download.

    Simulated engines, nano models and folders download nothing; a cache that evicts makes room.
    """
    needed: dict[str, dict[str, int]] = {}
    for variant in plan.variants:
        if is_downloaded(variant) and variant.model_cache.max_gib is None:
            pool = needed.setdefault(variant.pool, {})
            pool[variant.checkpoint] = _size(variant, catalogue)
    return needed


def is_downloaded(variant: Variant) -> bool:
    """Whether its engines need files of a Hugging Face repository, unless a path has that name."""
    simulated = variant.shape.engine == "sim" and SIM_FETCH not in variant.shape.engine_args
    return not simulated and _REPO.fullmatch(variant.checkpoint) is not None


def _size(variant: Variant, catalogue: Catalogue) -> int:
    """From the catalogue; of a checkpoint that it does not know, what the GPUs will hold."""
    sizes: Mapping[str, int | None] = {}
    try:
        entries = catalogue.model(variant.catalogue_model).checkpoints
        sizes = {entry.source: entry.size_bytes for entry in entries}
    except UnknownName:
        pass  # a repository that the fleet names itself
    shape = variant.shape
    return sizes.get(variant.checkpoint) or shape.per_gpu.weights_bytes * shape.num_gpus
