"""Heads of requests that were parsed before: the same bytes mean the same request.

A client sends the same head again and again, but for a few values (`content-length`, ids). What llhttp
and our rules once took is found here by all its other bytes; what is new takes the long way. The
values that may differ are of an alphabet that no rule depends on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_VARYING = re.compile(
    rb"\r\n([Cc]ontent-[Ll]ength|[Xx]-[Rr]equest-[Ii][Dd]|[Tt]raceparent): "
    rb"([0-9A-Za-z._:-]{1,128})(?=\r\n)"
)
_UNCUT = re.compile(rb"\r\n(content-length|x-request-id|traceparent):", re.IGNORECASE)
_MAX_HEADS = 512
_MAX_HEAD_BYTES = 4096
_MAX_LENGTH_DIGITS = 9
_UNCACHED = ("transfer-encoding", "expect", "upgrade")


@dataclass(slots=True)
class Head:
    """A request without its body. Header names are lower-case; it is never changed.

    `content-length` is not among the headers: the body tells it.
    """

    method: bytes
    path: str
    headers: dict[str, str]
    keep_alive: bool
    version: str
    query: str = ""


class HeadCache:
    """Heads of plain requests: a content-length or no body, no `expect`, no upgrade."""

    def __init__(self) -> None:
        self._heads: dict[tuple[bytes, ...], Head] = {}

    def find(self, data: bytes) -> tuple[Head, int] | None:
        """The head that these bytes are, and the length of the body behind it."""
        parts = _VARYING.split(data)  # fixed, name, value, fixed, name, value ... fixed
        values = parts[2::3]
        del parts[2::3]
        known = self._heads.get(tuple(parts))
        if known is None:
            return None
        length = 0
        others: dict[str, str] = {}
        for name, value in zip(parts[1::2], values, strict=True):
            key = name.decode().lower()
            if key != "content-length":
                others.setdefault(key, value.decode())
            elif value.isdigit() and len(value) <= _MAX_LENGTH_DIGITS:
                length = int(value)
            else:
                return None
        if not others:
            return known, length
        headers = {**known.headers, **others}
        head = Head(known.method, known.path, headers, known.keep_alive, known.version, known.query)
        return head, length

    def add(self, data: bytes, head: Head) -> None:
        """`data` was parsed, whole, as `head`."""
        if len(data) > _MAX_HEAD_BYTES or data[:1] in {b"\r", b"\n"}:
            return
        if any(name in head.headers for name in _UNCACHED):
            return
        parts = _VARYING.split(data)
        del parts[2::3]
        if any(_UNCUT.search(part) for part in parts[::2]):
            return  # one is written in an unusual way: it might count, and the others not
        if len(self._heads) >= _MAX_HEADS:
            self._heads.clear()
        self._heads[tuple(parts)] = head
