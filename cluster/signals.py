"""Signals of `bora up`: every way to end it ends it like Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_on_signals() -> None:
    """`bora down` (SIGTERM) and a closed terminal (SIGHUP) raise KeyboardInterrupt, as Ctrl-C does.

    SIGINT is set too: shells start background jobs with it ignored.
    """

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in _ENDING:
        signal.signal(number, interrupt)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """For an end that takes two seconds at most and must be complete."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
