"""Uploads: bodies that are arriving, of all of a worker's clients, so that their sum stays bounded."""

from __future__ import annotations

from typing import Protocol

from gateway.errors import UploadsFull


class Uploader(Protocol):
    """A connection that a body arrives on."""

    def refuse_upload(self, error: UploadsFull) -> None:
        """Drop what has arrived, and tell `hold` so."""


class Uploads:
    """How much each holds. Who holds most makes room for the others, so that small requests pass."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sizes: dict[Uploader, int] = {}
        self._total = 0

    def hold(self, uploader: Uploader, num_bytes: int) -> None:
        """So many bytes of `uploader` are here now. May refuse it, or another one."""
        self._total += num_bytes - self._sizes.pop(uploader, 0)
        if num_bytes:
            self._sizes[uploader] = num_bytes
        while self._total > self._max_bytes:
            largest = max(self._sizes, key=self._sizes.__getitem__)
            largest.refuse_upload(
                UploadsFull(
                    f"more than {self._max_bytes:,} bytes of requests are arriving, and this is the"
                    " largest of them: send it again later",
                    retry_after_s=1,
                )
            )
