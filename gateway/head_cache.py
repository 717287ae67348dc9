"""Heads of requests that were parsed before: the same bytes mean the same request.

Clients send the same head again and again, but for the number behind `content-length`. What llhttp
and our rules once took is found here by its bytes; all else takes the long way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: (\d{1,9})\r\n")
_MAX_HEADS = 512
_MAX_HEAD_BYTES = 4096
_Key = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Head:
    """A request without its body. Header names are lower-case; `headers` is never changed."""

    method: bytes
    path: str
    headers: dict[str, str]
    keep_alive: bool
    version: str


class HeadCache:
    """Heads of plain requests: a content-length or no body, no `expect`, no upgrade."""

    def __init__(self) -> None:
        self._heads: dict[_Key, Head] = {}

    def find(self, head: bytes) -> tuple[Head, int] | None:
        """The head that these bytes are, and the length of the body behind it."""
        length = _LENGTH.search(head)
        if length is None:
            known = self._heads.get((head, b""))
            return None if known is None else (known, 0)
        known = self._heads.get((head[: length.start(1)], head[length.end(1) :]))
        return None if known is None else (known, int(length[1]))

    def add(self, data: bytes, head: Head) -> None:
        """`data` was parsed, whole, as `head`."""
        headers = head.headers
        if len(data) > _MAX_HEAD_BYTES or data[:1] in {b"\r", b"\n"}:
            return
        if "transfer-encoding" in headers or "expect" in headers or "upgrade" in headers:
            return
        length = _LENGTH.search(data)
        if (length is None) != ("content-length" not in headers):
            return  # written in an unusual way
        if len(self._heads) >= _MAX_HEADS:
            self._heads.clear()
        key = (data, b"") if length is None else (data[: length.start(1)], data[length.end(1) :])
        self._heads[key] = head
