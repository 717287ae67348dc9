"""Heads of requests that were parsed before: the same bytes mean the same request.

A client sends the same head again and again, but for a few values (`content-length`, ids). What llhttp
and our rules once took is found here by all its other bytes; what is new takes the long way. The
values that may differ are of an alphabet that no rule depends on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gateway.head_template import HeadTemplate, template_of

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
    terms: Any = None  # what the application made of the headers


class KnownHead:
    """A head that was taken once, with a content-length that varies, and ids if it has any."""

    __slots__ = ("_head", "_names", "_template")

    def __init__(self, template: HeadTemplate, names: list[str], head: Head) -> None:
        self._template, self._names, self._head = template, names, head

    def read(self, data: bytes) -> tuple[Head, int, int] | None:
        """The head in front of `data`, where it ends, and the length of its body."""
        found = self._template.match(data)
        if found is None:
            return None
        values, end = found
        length = 0
        others: dict[str, str] = {}
        for name, value in zip(self._names, values, strict=True):
            if name != "content-length":
                if b" " in value or b"," in value:
                    return None
                others.setdefault(name, value.decode())
            elif value.isdigit() and len(value) <= _MAX_LENGTH_DIGITS:
                length = int(value)
            else:
                return None
        head = self._head
        if others:
            headers = {**head.headers, **others}
            head = Head(head.method, head.path, headers, head.keep_alive, head.version, head.query)
        return head, end, length


class HeadCache:
    """Heads of plain requests: a content-length or no body, no `expect`, no upgrade."""

    def __init__(self) -> None:
        self._heads: dict[tuple[bytes, ...], KnownHead] = {}

    def find(self, data: bytes) -> KnownHead | None:
        """Which known head these bytes are."""
        parts = _VARYING.split(data)  # fixed, name, value, fixed, name, value ... fixed
        del parts[2::3]
        return self._heads.get(tuple(parts))

    def add(self, data: bytes, head: Head) -> None:
        """`data` was parsed, whole, as `head`."""
        if len(data) > _MAX_HEAD_BYTES or data[:1] in {b"\r", b"\n"}:
            return
        if any(name in head.headers for name in _UNCACHED):
            return
        parts = _VARYING.split(data)
        template, names = template_of(parts), [name.decode().lower() for name in parts[1::3]]
        del parts[2::3]
        if any(_UNCUT.search(part) for part in parts[::2]):
            return  # one is written in an unusual way: it might count, and the others not
        if len(self._heads) >= _MAX_HEADS:
            self._heads.clear()
        self._heads[tuple(parts)] = KnownHead(template, names, head)
