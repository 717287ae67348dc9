"""Heads of JSON answers that were parsed before: an engine says the same but for date and length.

What llhttp once took is found here by all its other bytes; what is new takes the long way.
"""

from __future__ import annotations

import re

from gateway.answer import Answer
from gateway.head_template import HeadTemplate, template_of

_VARYING = re.compile(
    rb"\r\n([Dd]ate|[Cc]ontent-[Ll]ength|[Xx]-[Rr]equest-[Ii][Dd]): ([0-9A-Za-z ,:._-]{1,128})(?=\r\n)"
)
_MAX_HEADS = 4
_MAX_HEAD_BYTES = 2048
_MAX_LENGTH_DIGITS = 9
_MAX_ADDED = 1024  # engines that say something new each time are not worth the looking


class AnswerCache:
    """Whole answers of one engine, in one read, with a content-length and nothing unusual."""

    def __init__(self) -> None:
        self._known: list[tuple[HeadTemplate, int, Answer]] = []  # where the length stands
        self._num_added = 0

    def find(self, data: bytes) -> tuple[Answer, bytes] | None:
        """The answer and the body that `data` is, if all of it is known and there."""
        for template, number, answer in self._known:
            found = template.match(data)
            if found is not None:
                values, end = found
                length = values[number]
                plain = length.isdigit() and len(length) <= _MAX_LENGTH_DIGITS
                return (answer, data[end:]) if plain and len(data) == end + int(length) else None
        return None

    def add(self, data: bytes, answer: Answer) -> None:
        """`data` was read, whole, as this answer, which left its connection open."""
        end = data.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES) + 4
        if end < 4 or self._num_added >= _MAX_ADDED or not data.startswith(b"HTTP/1.1 200"):
            return
        names = [name for name, _ in answer.headers]
        if names.count(b"content-length") != 1 or b"transfer-encoding" in names:
            return
        parts = _VARYING.split(data[:end])
        varying = [name.lower() for name in parts[1::3]]
        if varying.count(b"content-length") != 1:
            return  # written in an unusual way
        self._num_added += 1
        number = varying.index(b"content-length")
        self._known.insert(0, (template_of(parts), number, answer))
        del self._known[_MAX_HEADS:]
