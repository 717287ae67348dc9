from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from placement.errors import ConfigError
from placement.trace import MAX_TOKENS, TraceRequest, read_trace
from tests.placement.trace_files import SUFFIXES, a_record, write_trace

HEADER = "timestamp_s,input_tokens,output_tokens\n"


def complaint(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        list(read_trace(path))
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def of_text(folder: Path, text: str | bytes, suffix: str = ".csv") -> Path:
    path = folder / f"t{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_form_tells_the_same_requests(tmp_path: Path, suffix: str) -> None:
    records = [
        a_record(0.25, model="chat", client_id="a"),
        a_record(0.25, model="", client_id="b", output_tokens=0),
        a_record(7.5, model="code", client_id="", input_tokens=30_000),
    ]

    assert list(read_trace(write_trace(tmp_path / f"t{suffix}", records))) == [
        TraceRequest(0.25, 100, 10, "chat", "a"),
        TraceRequest(0.25, 100, 0, "", "b"),
        TraceRequest(7.5, 30_000, 10, "code", ""),
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_prefix_blocks_are_read_where_they_are(tmp_path: Path, suffix: str) -> None:
    records = [a_record(0.0, hash_ids=[1, 2]), a_record(1.0, hash_ids=[])]
    found = read_trace(write_trace(tmp_path / f"t{suffix}", records))

    assert [request.prefix_blocks for request in found] == [(1, 2), ()]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_models_and_clients_may_be_left_out_and_other_columns_are_passed_over(
    tmp_path: Path, suffix: str
) -> None:
    path = write_trace(tmp_path / f"t{suffix}", [a_record(3, n_images=2)])

    assert list(read_trace(path)) == [TraceRequest(3.0, 100, 10)]


@given(
    gaps=st.lists(
        st.tuples(
            st.floats(0, 1e4), st.integers(0, MAX_TOKENS), st.sampled_from(["", "a,b", 'q"'])
        ),
        min_size=1,
    ),
    suffix=st.sampled_from(SUFFIXES),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[tuple[float, int, str]], suffix: str
) -> None:
    now_s, records = 0.0, []
    for gap_s, tokens, model in gaps:
        now_s += gap_s
        records.append(a_record(now_s, input_tokens=tokens, model=model))
    path = write_trace(tmp_path_factory.mktemp("trace") / f"t{suffix}", records)

    assert [(each.arrival_s, each.input_tokens, each.model) for each in read_trace(path)] == [
        (record["timestamp_s"], record["input_tokens"], record["model"]) for record in records
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"input_tokens": -4}, "input_tokens: got {-4}; give a whole number of tokens, 0 to "),
        ({"output_tokens": 1.5}, "output_tokens: got {1.5}; give a whole number of tokens"),
        ({"output_tokens": MAX_TOKENS + 1}, "output_tokens: got {10000001}; give a whole number"),
        ({"input_tokens": float("nan")}, "input_tokens: got {nan}; give a whole number"),
        ({"timestamp_s": float("nan")}, "timestamp_s: got {nan}; give seconds since the start"),
        ({"timestamp_s": float("inf")}, "timestamp_s: got {inf}; give seconds since the start"),
        ({"timestamp_s": -1.0}, "timestamp_s: got {-1.0}; give seconds since the start"),
        ({"input_tokens": None}, "input_tokens: nothing there; give a whole number of tokens"),
        ({"timestamp_s": 0.5}, "timestamp_s: 0.5 is earlier than 1 of the request before; sort"),
    ],
)
def test_a_wrong_value_is_told_with_row_column_and_cure(
    tmp_path: Path, suffix: str, changes: dict[str, Any], told: str
) -> None:
    records = [a_record(1.0), a_record(1.0), {**a_record(1.0), **changes}, a_record(2.0)]
    where = {".parquet": "row 3", ".csv": "line 4", ".jsonl": "line 3"}[suffix]
    quote = "'" if suffix == ".csv" else ""
    expected = told.replace("{", quote).replace("}", quote)
    value = next(iter(changes.values()))
    if suffix == ".parquet" and isinstance(value, float) and "tokens" in next(iter(changes)):
        records = [{k: float(v) for k, v in record.items()} for record in records]

    assert complaint(write_trace(tmp_path / f"t{suffix}", records)).startswith(
        f"{where}: {expected}"
    )


@pytest.mark.parametrize(
    ("text", "suffix", "told"),
    [
        ("", ".csv", "line 1: timestamp_s: no such column; a trace has timestamp_s, input_tokens"),
        ("", ".jsonl", "holds no request; give a trace with at least one"),
        (HEADER, ".csv", "holds no request; give a trace with at least one"),
        (
            "TIMESTAMP,input_tokens,output_tokens\n",
            ".csv",
            "line 1: timestamp_s: no such column; did you mean 'TIMESTAMP'?; a trace has ",
        ),
        (
            "timestamp_s,input_tokens,input_tokens,output_tokens\n",
            ".csv",
            "line 1: input_tokens: stands twice; leave one of them out",
        ),
        (HEADER + "1,2\n", ".csv", "line 2: 2 cells, but the header has 3"),
        (HEADER + "1,two,3\n", ".csv", "line 2: input_tokens: got 'two'; give a whole number"),
        (HEADER + '1,"2,3\n', ".csv", "line 2: no CSV: unexpected end of data; check its quotes"),
        (HEADER.encode() + b"\xff,2,3\n", ".csv", "line 2: no UTF-8; give text"),
        ('{"timestamp_s": 1}\n', ".jsonl", "line 1: input_tokens: no such column"),
        ("[1, 2]\n", ".jsonl", "line 1: no object; give one a line, with timestamp_s"),
        ("\n{\n", ".jsonl", "line 2: no JSON: "),
        ("x" * 17_000_000, ".jsonl", "line 1: longer than 16,777,216 bytes; give a request a line"),
        (HEADER, ".csv.gz", "is not gzip, or cut short: "),
        (gzip.compress(HEADER.encode())[:-9], ".csv.gz", "is not gzip, or cut short: "),
        ("PAR1", ".parquet", "no Parquet file, or damaged: "),
        (HEADER, ".txt", "a trace ends with .parquet, .csv, .csv.gz, .jsonl, .jsonl.gz; rename"),
    ],
)
def test_a_file_that_is_no_trace_is_told_with_its_cure(
    tmp_path: Path, text: str | bytes, suffix: str, told: str
) -> None:
    assert complaint(of_text(tmp_path, text, suffix)).startswith(told)


def test_folders_and_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()

    assert complaint(tmp_path / "t.csv") == "is a folder; give one file"
    assert complaint(tmp_path / "gone.csv").startswith("no such file")
    assert complaint(Path("/proc/self/mem.csv")).startswith("no such file")


def test_parquet_that_is_damaged_within_is_told(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.parquet", [a_record(float(n)) for n in range(3000)])
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(data)

    assert complaint(path).startswith("no Parquet file, or damaged: ")


def test_parquet_with_dates_or_without_a_column_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    numbers = pa.array([1], pa.int32())
    table = pa.table({"timestamp_s": numbers.cast(pa.int64()).cast(pa.timestamp("s"))})
    parquet.write_table(table, path)
    assert complaint(path).startswith("input_tokens: no such column")

    table = table.append_column("input_tokens", numbers).append_column("output_tokens", numbers)
    parquet.write_table(table, path)
    assert complaint(path) == "timestamp_s: is a column of timestamp[ms]; make it one of numbers"


@pytest.mark.parametrize("blocks", ['"[1"', "7", "true", '["a"]', "[true]"])
def test_prefix_blocks_are_a_list_of_numbers(tmp_path: Path, blocks: str) -> None:
    text = f'{{"timestamp_s":1,"input_tokens":1,"output_tokens":1,"hash_ids":{blocks}}}\n'

    assert complaint(of_text(tmp_path, text, ".jsonl")).startswith("line 1: hash_ids: got ")


def test_text_begins_with_a_byte_order_mark_where_windows_wrote_it(tmp_path: Path) -> None:
    path = of_text(tmp_path, b"\xef\xbb\xbf" + (HEADER + "1,2,3\r\n\r\n").encode())

    assert list(read_trace(path)) == [TraceRequest(1.0, 2, 3)]


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl"])
def test_memory_does_not_grow_with_the_trace(tmp_path: Path, suffix: str) -> None:
    path = write_trace(tmp_path / f"t{suffix}", [a_record(float(n)) for n in range(10_000)])
    tracemalloc.start()
    try:
        seen = sum(1 for _ in read_trace(path))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert seen == 10_000
    assert most < 2**20
