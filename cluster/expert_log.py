"""How evenly experts are loaded over an engine's ranks, which only its log tells."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cluster.engines.adapter import Engine
from placement.plan import Variant


class ExpertLog:
    """Follows `log`, the output of an `engine` that runs `variant`, if that balances experts."""

    def __init__(self, engine: Engine, variant: Variant, log: Path) -> None:
        self._engine = engine
        self._log = log
        self._is_told = "--enable-eplb" in variant.shape.engine_args
        self._read = 0  # bytes
        self._balance: float | None = None

    def balance(self) -> float | None:
        """Mean load of the ranks over the largest, 0..1, when it was measured last."""
        if not self._is_told:
            return None
        with contextlib.suppress(FileNotFoundError), self._log.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
            self._read += len(whole)
            told = self._engine.expert_balance(whole.decode(errors="replace"))
            self._balance = self._balance if told is None else told
        return self._balance
