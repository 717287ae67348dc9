"""What of an engine's answer is for the client: headers, its own name of the model, usage."""

from __future__ import annotations

import json
import re
from functools import lru_cache

from gateway.answer import Answer
from gateway.record import Record

_NOT_FORWARDED = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer"),
        *(b"transfer-encoding", b"upgrade", b"content-length", b"date", b"server"),
        *(b"set-cookie", b"x-request-id", b"x-bora-variant", b"x-bora-endpoint"),
        b"x-bora-prefill-endpoint",
    )
)
_UNSAFE_IN_HEADER = re.compile(r"[^\x21-\x7e]")


def header_lines(answer: Answer, record: Record) -> bytes:
    """The headers for the client as HTTP has them, each with its line end."""
    if answer.lines is None:
        lines = [b"%b: %b\r\n" % one for one in answer.headers if one[0] not in _NOT_FORWARDED]
        if answer.status in {429, 503} and not any(k == b"retry-after" for k, _ in answer.headers):
            lines.append(b"retry-after: 1\r\n")
        answer.lines = b"".join(lines)
    return answer.lines + lines_of_ours(record)


def lines_of_ours(record: Record) -> bytes:
    """Who answers, and the request's id."""
    names = _names(record.variant, record.endpoint)
    if record.more_headers:
        names += record.more_headers
    return names + b"x-request-id: %b\r\n" % record.request_id.encode()


def one_of_ours(name: str, value: str) -> bytes:
    """`x-bora-NAME: value` with its line end, for a record's `more_headers`."""
    return f"x-bora-{name}: {_UNSAFE_IN_HEADER.sub('?', value)}\r\n".encode()


def headers_of(lines: bytes) -> dict[str, str]:
    """Header lines as names (lower case) and values."""
    pairs = lines.decode("latin-1").split("\r\n")
    return dict(line.split(": ", 1) for line in pairs if line)


class Renamer:
    """Gives a model back the name that the client knows it by.

    Quotes inside of JSON strings are escaped, so that text of the model is never taken for it.
    """

    __slots__ = ("_found", "_told")

    def __init__(self, served: str, told: str) -> None:
        self._found = re.compile(rb'("model": ?)' + re.escape(_quoted(served)))
        self._told = rb"\1" + _quoted(told).replace(b"\\", rb"\\")

    def __call__(self, data: bytes) -> bytes:
        """`data` with the client's name of the model."""
        return self._found.sub(self._told, data)


@lru_cache(maxsize=4096)
def renamer(served: str, told: str) -> Renamer | None:
    """None where the names are the same."""
    return None if served == told else Renamer(served, told)


@lru_cache(maxsize=4096)
def _names(variant: str, endpoint: str) -> bytes:
    variant, endpoint = (_UNSAFE_IN_HEADER.sub("?", name) for name in (variant, endpoint))
    return f"x-bora-variant: {variant}\r\nx-bora-endpoint: {endpoint}\r\n".encode()


def _quoted(name: str) -> bytes:
    return json.dumps(name).encode()
