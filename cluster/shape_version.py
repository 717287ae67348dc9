"""When a running engine no longer is what the plan wants."""

from __future__ import annotations

import hashlib

from placement.plan import Variant


def shape_version(variant: Variant) -> str:
    """Changes exactly when a running engine does not fit the variant any more.

    Replica bounds, scaling, aliases and predictions may change under a running engine.
    """
    keep = {"model", "catalogue_model", "checkpoint", "checkpoint_format", "pool", "simulated_gpu"}
    branch = "" if variant.revision == "main" else variant.revision  # what it stands for is unknown
    text = variant.model_dump_json(include=keep) + (variant.commit or branch)
    shape = variant.shape.model_dump_json(exclude={"prediction"})
    return hashlib.sha256((text + shape).encode()).hexdigest()[:16]
