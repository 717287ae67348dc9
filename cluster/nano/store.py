"""Nano models on disk: made on first use, found afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.nano.gguf_file import GGUF_FORMAT, GGUF_MODELS, GGUF_PRECISIONS, write_gguf
from cluster.nano.recipes import NAMES, RECIPES, Recipe
from cluster.nano.weights import write
from placement.errors import UnknownName

FORMAT = 1  # raise it when the same recipe gives other bytes


def _silent(_: str) -> None:
    pass


def ensure(
    name: str, cache: Path | None = None, *, progress: Callable[[str], None] = _silent
) -> Path:
    """The folder of the nano model `name`; written first (about a second) if it is not there.

    `cache` is `$BORA_CACHE`, or `~/.cache/bora`, unless given. Safe to call from many processes
    at once, and a folder that is there is complete: it appears by one rename.

    Raises:
        UnknownName: there is no such model.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise UnknownName("nano model", name, NAMES)
    home = (cache or default_cache()) / "nano"
    folder = home / f"{name}-{content_version(name)}"
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / f".{folder.name}.lock"):
        if not folder.is_dir():
            progress(f"writing {name} to {folder}")
            _make(name, recipe, folder)
    return folder


def ensure_gguf(name: str, precision: str, cache: Path | None = None) -> Path:
    """The nano model `name` as a GGUF file of `precision`, for llama.cpp; written as by `ensure`.

    Raises:
        UnknownName: there is no such model, or not in that form.
    """
    if name not in GGUF_MODELS:
        raise UnknownName("nano model with a GGUF file", name, GGUF_MODELS)
    if precision not in GGUF_PRECISIONS:
        raise UnknownName("precision of nano GGUF files", precision, GGUF_PRECISIONS)
    home = (cache or default_cache()) / "nano"
    file = home / f"{name}-{content_version(name)}-{GGUF_FORMAT}-{precision}.gguf"
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / f".{file.name}.lock"):
        if not file.exists():
            recipe = RECIPES[name]
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            try:
                write_gguf(
                    temporary, name, recipe.config, list(recipe.tensors(recipe.config)), precision
                )
                temporary.rename(file)
            finally:
                temporary.unlink(missing_ok=True)
    return file


def content_version(name: str) -> str:
    """Eight hexadecimal digits that change when the model's files do."""
    recipe = RECIPES[name]
    tensors = [[t.name, t.shape, t.std, t.num_zero_rows] for t in recipe.tensors(recipe.config)]
    content = json.dumps([FORMAT, recipe.config, tensors], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def default_cache() -> Path:
    """`$BORA_CACHE`, or `bora` in the user's cache folder."""
    if given := os.environ.get("BORA_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bora"


def _make(name: str, recipe: Recipe, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        recipe.write_config(temporary)
        recipe.tokenizer(temporary, recipe.config)
        write(temporary / recipe.weights_file, list(recipe.tensors(recipe.config)), seed=name)
        temporary.chmod(0o755)  # mkdtemp's 700 would hide it from an engine in a container
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
