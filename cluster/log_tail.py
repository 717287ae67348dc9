"""The end of a log file, and what has come since, in whole lines. Knows no Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cluster.messages import LogPart

MOST_BYTES = 2**20  # of one part: more comes with the next


def last_lines(file: Path, count: int, *, partial: bool = False) -> LogPart:
    """The last `count` whole lines; with `partial` a last one without its end is one of them."""
    with _opened(file) as log:
        if isinstance(log, LogPart):
            return log
        size = log.seek(0, os.SEEK_END)
        span, text = 0, b""
        while span < size and text.count(b"\n") <= count:
            span = min(size, 2 * span or 400 * count)
            log.seek(size - span)
            text = log.read(span)
        if not partial:
            text = text[: text.rfind(b"\n") + 1]
        return LogPart(lines=_lines(text)[-count:], offset=size - span + len(text))


def lines_after(file: Path, offset: int) -> LogPart:
    """Whole lines from byte `offset` on; from the beginning where the file was begun anew."""
    with _opened(file) as log:
        if isinstance(log, LogPart):
            return log
        if log.seek(0, os.SEEK_END) < offset:
            offset = 0
        log.seek(offset)
        text = log.read(MOST_BYTES)
        if len(text) < MOST_BYTES or b"\n" in text:  # else a line that is longer: in pieces
            text = text[: text.rfind(b"\n") + 1]
        return LogPart(lines=_lines(text), offset=offset + len(text))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO | LogPart]:
    """The file, or why there is nothing to read."""
    try:
        log = file.open("rb")
    except FileNotFoundError:
        yield LogPart(missing=True)
    except OSError as error:
        yield LogPart(problem=f"cannot be read: {error.strerror}")
    else:
        with log:
            yield log


def _lines(text: bytes) -> tuple[str, ...]:
    return tuple(text.decode(errors="replace").splitlines())
