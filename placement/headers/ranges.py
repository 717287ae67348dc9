"""Where header bytes come from: a local file, or anything else that gives byte ranges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from placement.errors import ConfigError


class ByteRanges(Protocol):
    """A file of which parts can be read; `name` stands in errors."""

    @property
    def name(self) -> str:
        """How people call the file."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on; fewer than `length` at the end of the file."""
        ...


@dataclass(frozen=True, slots=True)
class LocalFile:
    """`ByteRanges` of a file on this machine."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def size_bytes(self) -> int:
        """Of the file; a `ConfigError` when it cannot be looked at."""
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from error

    def read(self, offset: int, length: int) -> bytes:
        """Read a part of the file; a `ConfigError` when that fails."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class BytesInMemory:
    """`ByteRanges` of bytes that are already here."""

    name: str
    content: bytes

    @property
    def size_bytes(self) -> int:
        """Of the content."""
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        """Cut out a part."""
        return self.content[offset : offset + length]


def read_exactly(source: ByteRanges, offset: int, length: int, what: str) -> bytes:
    """`length` bytes at `offset`.

    Raises:
        ConfigError: the file ends before, which the message calls truncated.
    """
    data = source.read(offset, length)
    if len(data) < length:
        raise ConfigError(
            f"{source.name}: truncated: {what} needs {length:,} bytes at {offset:,}, "
            f"the file has {source.size_bytes:,}"
        )
    return data
