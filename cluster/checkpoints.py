"""Where a variant's weights are on this node."""

from __future__ import annotations

from pathlib import Path

from cluster import nano
from placement.plan import Variant


def locate(variant: Variant) -> Path | str:
    """A local folder or file; or the Hugging Face repo id, which the engine downloads itself.

    Nano models are made here on first use.
    """
    if variant.shape.engine == "sim":
        return variant.checkpoint
    kind, _, name = variant.checkpoint.partition(":")
    if kind == "nano" and name:
        model, _, file = name.partition("/")
        return nano.ensure_gguf(model, file.removesuffix(".gguf")) if file else nano.ensure(name)
    path = Path(variant.checkpoint)
    return path.resolve() if path.exists() else variant.checkpoint
