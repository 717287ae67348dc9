"""Writing small files so that nobody reads half of one, or one that is not meant for them."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write `path` in one step: a crash leaves the old or the new text."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def replace_private(path: Path, text: str) -> None:
    """As `replace_text`, for a file that only its owner may read."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    write_private(new, text)
    new.replace(path)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
