"""Rows of a trace's file as they stand there, a piece at a time, whatever kind of file it is."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from placement.errors import ConfigError, nearest

NEEDED = ("timestamp_s", "input_tokens", "output_tokens")
KNOWN = (*NEEDED, "model", "client_id", "hash_ids")
_MAX_LINE_BYTES = 16 * 2**20  # a longer line is no request
_BATCH_ROWS = 8192
_BUFFER_BYTES = 2**20  # of a Parquet column that is being read

Row = tuple[int, tuple[Any, ...]]  # number from 1, and its values of KNOWN; None: there is none


def rows(path: Path) -> Iterator[Row]:
    """The rows of a file, unchecked, with their numbers; of text: of their lines.

    Raises:
        ConfigError: it cannot be read, is of no known kind, damaged, or lacks a column.
    """
    name = path.name.lower()
    read = next((read for suffix, read in _READERS.items() if name.endswith(suffix)), None)
    with _told(path):
        if path.is_dir():
            raise IsADirectoryError
        if read is None:
            raise ConfigError(
                f"{path}: a trace ends with {', '.join(_READERS)}; rename or convert it"
            )
        yield from read(path)


def row_word(path: Path) -> str:
    """What the numbers of its rows count."""
    return "row" if path.name.lower().endswith(".parquet") else "line"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What goes wrong with the file as a whole, with a cure."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a trace is looked for beside the fleet") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give one file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: is not gzip, or cut short: {error}; make it anew") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror or error}; check its permissions and disk"
        ) from error


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # noqa: PLC0415 - a fifth of a second, rarely needed

    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            names = file.schema_arrow.names
            _require(path, "", names)
            _require_numbers(path, file.schema_arrow)
            there = [name for name in KNOWN if name in names]
            batches = file.iter_batches(_BATCH_ROWS, columns=there, use_threads=False)
            number = 0
            for batch in batches:
                nothing = [None] * batch.num_rows
                columns = [
                    batch.column(name).to_pylist() if name in there else nothing for name in KNOWN
                ]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield number, values
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of what stands there
        what = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: no Parquet file, or damaged: {what}; make it anew") from None


def _require_numbers(path: Path, schema: Any) -> None:
    from pyarrow import types  # noqa: PLC0415 - as above

    for name in NEEDED:
        kind = schema.field(name).type
        if not (types.is_integer(kind) or types.is_floating(kind)):
            raise ConfigError(f"{path}: {name}: is a column of {kind}; make it one of numbers")


def _csv(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        lines = csv.reader((line for _, line in _lines(path, file)), strict=True)
        try:
            header = next(lines, [])
            _require(path, "line 1: ", header)
            places = [header.index(name) if name in header else None for name in KNOWN]
            for cells in lines:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ConfigError(
                        f"{path}: line {lines.line_num}: {len(cells)} cells, but the header has {len(header)}; "
                        "give one for each column"
                    )
                yield lines.line_num, tuple(None if at is None else cells[at] for at in places)
        except csv.Error as error:
            where = f"{path}: line {lines.line_num}"
            raise ConfigError(f"{where}: no CSV: {error}; check its quotes") from None


def _jsonl(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in _lines(path, file):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = f"no JSON: {error}; give one object a line"
                raise ConfigError(f"{path}: line {number}: {why}") from None
            if not isinstance(record, Mapping):
                raise ConfigError(
                    f"{path}: line {number}: no object; give one a line, with {_COLUMNS}"
                )
            if not record.keys() >= _NEEDED:
                _require(path, f"line {number}: ", list(record))
            yield number, tuple(record.get(name) for name in KNOWN)


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _parquet, ".csv": _csv, ".csv.gz": _csv, ".jsonl": _jsonl, ".jsonl.gz": _jsonl,
}  # fmt: skip
_COLUMNS = ", ".join(NEEDED)
_NEEDED = frozenset(NEEDED)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path, file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, str]]:
    """Lines of text with their numbers; one without an end does not fill the memory."""
    number = 0
    while line := file.readline(_MAX_LINE_BYTES):
        number += 1
        if len(line) == _MAX_LINE_BYTES:
            raise ConfigError(
                f"{path}: line {number}: longer than {_MAX_LINE_BYTES:,} bytes; give a request a line"
            )
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: line {number}: no UTF-8; give text") from None


def _require(path: Path, where: str, names: Sequence[str]) -> None:
    """That the needed columns are there, and none that is read twice."""
    for name in NEEDED:
        if name not in names:
            hint = nearest(name, names)
            raise ConfigError(
                f"{path}: {where}{name}: no such column{hint}; a trace has {_COLUMNS}, with times "
                "in seconds from its start"
            )
    for name in KNOWN:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: {where}{name}: stands twice; leave one of them out")
