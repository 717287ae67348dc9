"""Where a variant's weights are, or where they must be downloaded from."""

from __future__ import annotations

from pathlib import Path

from cluster import nano
from cluster.model_cache import Wanted
from cluster.weight_files import gguf_files
from placement.checkpoint_room import is_downloaded
from placement.plan import Variant


def to_download(variant: Variant) -> Wanted | None:
    """What engines of this variant need from a hub; None: it is made or lies on the node."""
    if not is_downloaded(variant) or Path(variant.checkpoint).exists():
        return None
    return Wanted(
        repo=variant.checkpoint,
        revision=variant.revision,
        commit=variant.commit,
        checkpoint_format=variant.checkpoint_format,
        precision=variant.shape.precision if variant.checkpoint_format == "gguf" else "",
    )


def in_snapshot(wanted: Wanted, snapshot: Path) -> Path:
    """What an engine is given: the folder, or the first GGUF file in it."""
    if wanted.checkpoint_format != "gguf":
        return snapshot
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf")]
    return snapshot / gguf_files(names, wanted.precision)[0]


def locate(variant: Variant) -> Path | str:
    """A local folder or file. A simulated engine has none; a name that is no path stays one.

    Nano models are made here on first use.
    """
    if variant.shape.engine == "sim":
        return variant.checkpoint
    kind, _, name = variant.checkpoint.partition(":")
    if kind == "nano" and name:
        model, _, file = name.partition("/")
        return nano.ensure_gguf(model, file.removesuffix(".gguf")) if file else nano.ensure(name)
    path = Path(variant.checkpoint)
    # Links are not followed: the other parts of a GGUF model lie beside the link to the first.
    return path.absolute() if path.exists() else variant.checkpoint
