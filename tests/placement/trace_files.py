"""Traces written to files, in every form that is read."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")

Records = Sequence[Mapping[str, Any]]


def a_record(timestamp_s: Any = 0.0, **changes: Any) -> dict[str, Any]:
    return {"timestamp_s": timestamp_s, "input_tokens": 100, "output_tokens": 10, **changes}


def write_trace(path: Path, records: Records) -> Path:
    if path.suffix == ".parquet":
        # Row groups smaller than the file, as of a trace of days.
        parquet.write_table(pa.Table.from_pylist(list(records)), path, row_group_size=1000)
        return path
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if ".jsonl" in path.name:
            file.writelines(f"{json.dumps(record)}\n" for record in records)
        else:
            rows = csv.DictWriter(file, list(records[0]))
            rows.writeheader()
            rows.writerows(records)
    return path
