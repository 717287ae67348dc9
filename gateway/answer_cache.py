"""Heads of JSON answers that were parsed before: an engine says the same but for date and length.

What llhttp once took is found here by all its other bytes; what is new takes the long way.
"""

from __future__ import annotations

import re

from gateway.answer import Answer

_VARYING = re.compile(
    rb"\r\n([Dd]ate|[Cc]ontent-[Ll]ength|[Xx]-[Rr]equest-[Ii][Dd]): ([0-9A-Za-z ,:._-]{1,128})(?=\r\n)"
)
_MAX_HEADS = 128
_MAX_HEAD_BYTES = 2048
_MAX_LENGTH_DIGITS = 9
_MAX_CLEARED = 8  # engines that say something new each time are not worth the looking


class AnswerCache:
    """Whole answers in one read, with a content-length and nothing unusual."""

    def __init__(self) -> None:
        self._answers: dict[tuple[bytes, ...], Answer] = {}
        self._num_cleared = 0

    def find(self, data: bytes) -> tuple[Answer, bytes] | None:
        """The answer and the body that `data` is, if all of it is known and there."""
        end = data.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES) + 4
        if end < 4:
            return None
        parts = _VARYING.split(data[:end])  # fixed, name, value, fixed, name, value ... fixed
        values = parts[2::3]
        del parts[2::3]
        answer = self._answers.get(tuple(parts))
        if answer is None:
            return None
        for name, value in zip(parts[1::2], values, strict=True):
            if name[:1] in b"cC":
                plain = value.isdigit() and len(value) <= _MAX_LENGTH_DIGITS
                return (answer, data[end:]) if plain and len(data) == end + int(value) else None
        return None

    def add(self, data: bytes, answer: Answer) -> None:
        """`data` was read, whole, as this answer, which left its connection open."""
        end = data.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES) + 4
        if end < 4 or self._num_cleared > _MAX_CLEARED or not data.startswith(b"HTTP/1.1 200"):
            return
        names = [name for name, _ in answer.headers]
        if names.count(b"content-length") != 1 or b"transfer-encoding" in names:
            return
        parts = _VARYING.split(data[:end])
        del parts[2::3]
        if [name.lower() for name in parts[1::2]].count(b"content-length") != 1:
            return  # written in an unusual way
        if len(self._answers) >= _MAX_HEADS:
            self._answers.clear()
            self._num_cleared += 1
        self._answers[tuple(parts)] = answer
