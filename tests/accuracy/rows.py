"""Rows of measurements, and what of a configuration they tell in words."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MEASUREMENTS = Path(__file__).with_name("measurements.csv")
MEMORY_KINDS = ("params", "size", "memory", "kv", "fit")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number. Empty cells are None."""

    line: int
    kind: str
    model: str
    precision: str
    engine: str
    gpu: str
    n_gpus: int | None
    tensor_parallel_size: int
    pipeline_parallel_size: int
    context: int | None
    batch: int | None
    value: float
    unit: str
    source: str
    note: str
    lengths: str = ""  # prompt/answer tokens, where `context` is no number

    @property
    def text(self) -> str:
        """Everything said about the run."""
        return f"{self.note}; {self.source}"

    def told(self, pattern: str) -> str | None:
        """The first group of `pattern` in what is said."""
        found = re.search(pattern, self.text)
        return found[1] if found else None

    @property
    def label(self) -> str:
        """Short enough for a table."""
        parts = [self.model, self.precision, self.gpu]
        if self.tensor_parallel_size > 1:
            parts.append(f"TP{self.tensor_parallel_size}")
        if self.pipeline_parallel_size > 1:
            parts.append(f"PP{self.pipeline_parallel_size}")
        if self.engine:
            parts.append(self.engine)
        return " ".join(part for part in parts if part)


def read_rows(path: Path = MEASUREMENTS, kinds: Sequence[str] = MEMORY_KINDS) -> list[Row]:
    """Rows of these kinds, in the file's order."""
    with path.open(encoding="utf-8", newline="") as handle:
        cells = list(csv.DictReader(handle))
    return [
        Row(
            line=line,
            kind=cell["kind"],
            model=cell["model"],
            precision=cell["precision"],
            engine=cell["engine"],
            gpu=cell["gpu"],
            n_gpus=_number(cell["n_gpus"]),
            tensor_parallel_size=_number(cell["tp"]) or 1,
            pipeline_parallel_size=_number(cell["pp"]) or 1,
            context=_number(cell["context"]),
            batch=_number(cell["batch"]),
            value=float(cell["value"]),
            unit=cell["unit"],
            source=cell["source"],
            note=cell["note"],
            lengths=cell["context"],
        )
        for line, cell in enumerate(cells, start=2)
        if cell["kind"] in kinds
    ]


def _number(cell: str) -> int | None:
    return int(cell) if cell.isdigit() else None
