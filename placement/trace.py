"""A trace of requests, row by row: when each came and how long it was. Memory is bounded.

Files are Parquet, CSV or JSON lines (these two also with gzip), told apart by suffix, with the
columns `timestamp_s`, `input_tokens`, `output_tokens` and, where known, `model`, `client_id` and
`hash_ids`. Other columns are passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from placement.errors import ConfigError
from placement.trace_rows import row_word, rows

MAX_TOKENS = 10_000_000  # of a prompt or an answer: beyond any model's context
_MAX_SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    arrival_s: float  # since the start of the trace
    input_tokens: int
    output_tokens: int
    model: str = ""  # empty: the trace does not say
    client: str = ""  # tenant
    prefix_blocks: tuple[int, ...] = ()  # equal ids at the start: prompts that begin alike


def read_trace(path: Path) -> Iterator[TraceRequest]:
    """The requests of a trace in the order of their arrival, at least one.

    Raises:
        ConfigError: the file cannot be read, is of no known kind, lacks a column, holds nothing, or
            a value is no count or no time, or comes before its predecessor: with file, row (of
            text: line), column and value.
    """
    last_s, number = 0.0, 0
    for number, values in rows(path):
        try:
            request = _request(values, last_s)
        except ConfigError as error:
            raise ConfigError(f"{path}: {row_word(path)} {number}: {error}") from None
        last_s = request.arrival_s
        yield request
    if number == 0:
        raise ConfigError(f"{path}: holds no request; give a trace with at least one")


def _request(values: tuple[Any, ...], last_s: float) -> TraceRequest:
    arrival, prompt, answer, model, client, blocks = values
    return TraceRequest(
        arrival_s=_seconds(arrival, last_s),
        input_tokens=_tokens("input_tokens", prompt),
        output_tokens=_tokens("output_tokens", answer),
        model=_text("model", model),
        client=_text("client_id", client),
        prefix_blocks=_blocks(blocks) if blocks else (),
    )


def _seconds(value: Any, last_s: float) -> float:
    number = _number(value)
    if number is None or not math.isfinite(number) or number < 0:
        cure = "give seconds since the start of the trace, 0 or more"
        _refuse("timestamp_s", value, cure)
    if number < last_s:
        raise ConfigError(
            f"timestamp_s: {number:g} is earlier than {last_s:g} of the request before; sort the "
            "trace by timestamp_s"
        )
    return float(number)


def _tokens(column: str, value: Any) -> int:
    number = _number(value)
    if number is None or not 0 <= number <= MAX_TOKENS or number != int(number):
        cure = f"give a whole number of tokens, 0 to {MAX_TOKENS:,}, or leave the request out"
        _refuse(column, value, cure)
    return int(number)


def _number(value: Any) -> float | int | None:
    """None: `value` is no number, nor text that says one."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(column: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _refuse(column, value, "give text, or leave it empty")


def _blocks(value: Any) -> tuple[int, ...]:
    """Of text: a list as JSON writes it."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, list) or not all(type(block) is int for block in found):
        _refuse("hash_ids", value, "give a list of whole numbers, as [1, 2]")
    return tuple(found)


def _refuse(column: str, value: Any, cure: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
    got = "nothing there" if value is None or value == "" else f"got {shown}"
    raise ConfigError(f"{column}: {got}; {cure}")
