"""HeadTemplate: a head of HTTP whose bytes are known, but for the values of a few headers."""

from __future__ import annotations

import re

_LONGEST_VALUE_BYTES = 130
_PLAIN = re.compile(rb"[0-9A-Za-z ,:._-]{1,128}")


class HeadTemplate:
    """`pieces` are what stands before, between and behind the values that vary."""

    __slots__ = ("_last", "_pieces", "_plain")

    def __init__(self, pieces: list[bytes]) -> None:
        *self._pieces, self._last = pieces
        self._plain: list[bytes] = [b""] * len(
            self._pieces
        )  # the values seen last, known to be plain

    def match(self, data: bytes) -> tuple[list[bytes], int] | None:
        """The values, and where the head in front of `data` ends; None: another head.

        Values are of letters, digits, blanks and `,:._-`.
        """
        at, values = 0, []
        plain = self._plain
        for number, piece in enumerate(self._pieces):
            if not data.startswith(piece, at):
                return None
            at += len(piece)
            end = data.find(b"\r\n", at, at + _LONGEST_VALUE_BYTES)
            if end < 0:
                return None
            value = data[at:end]
            if value != plain[number]:
                if _PLAIN.fullmatch(value) is None:
                    return None
                plain[number] = value
            values.append(value)
            at = end
        if not data.startswith(self._last, at):
            return None
        return values, at + len(self._last)


def template_of(parts: list[bytes]) -> HeadTemplate:
    """From what `re.split` gives with a name and a value as groups: text, name, value, text ..."""
    pieces = []
    before = parts[0]
    for name, after in zip(parts[1::3], parts[3::3], strict=True):
        pieces.append(b"%b\r\n%b: " % (before, name))
        before = after
    return HeadTemplate([*pieces, before])
