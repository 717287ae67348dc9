"""HubFile: a file as a hub lists it, and the checksum by which it is known."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_BLOCK = 4 * 2**20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. `checksum` names it in the cache, too.

    SHA-256 of what the repository keeps in large-file storage, else git's SHA-1.
    """

    path: str
    size_bytes: int
    checksum: str


def partial_of(blob: Path) -> Path:
    """Where a download of `blob` grows."""
    return blob.with_name(f"{blob.name}.incomplete")


def checksum(path: Path, like: str) -> str:
    """SHA-256 in hex, or git's SHA-1 where `like` is one. Reads the whole file."""
    with path.open("rb") as file:
        if len(like) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())  # noqa: S324 - git's own
        while block := file.read(_BLOCK):
            digest.update(block)
        return digest.hexdigest()
