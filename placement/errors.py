"""What can go wrong while deciding.

PlacementError
├── ConfigError       a file or an option is wrong: file, line, key, what was expected (exit code 2)
├── UnknownName       a model, GPU type, pool ... that nobody has heard of, with the nearest names (2)
└── DoesNotFit        the fleet or model cannot run on these GPUs: the binding constraint (3)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlacementError(Exception):
    """Base of this package's errors. `exit_code` is what the CLI ends with."""

    exit_code = 2


class ConfigError(PlacementError):
    """A file or option is wrong. The message names file, line, key, and what was expected."""


class UnknownName(PlacementError):
    """A name that is not in the catalogue, the fleet or the inventory."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        super().__init__(f"unknown {kind} {name!r}{nearest(name, known)}")
        self.kind = kind
        self.name = name


class DoesNotFit(PlacementError):
    """No legal shape of the model fits the GPUs offered; the message holds the numbers."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with up to three close names, or all of them when there are few."""
    known = sorted(known)
    lowered = {candidate.lower(): candidate for candidate in known}
    close = [lowered[hit] for hit in difflib.get_close_matches(name.lower(), lowered, n=3)]
    if close:
        return f"; did you mean {' or '.join(repr(hit) for hit in close)}?"
    if 0 < len(known) <= 12:
        return f"; known: {', '.join(known)}"
    return ""
