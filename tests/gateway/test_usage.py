from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.usage import USAGE_KEY, Usage, find_usage

_COUNTS = st.integers(0, 10**9 - 1)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_SPOOFS = st.sampled_from(
    ['"usage": {"prompt_tokens": 666, "completion_tokens": 666}', '\\"usage\\"', '"usage', "{"]
)


@settings(max_examples=300)
@given(
    st.binary() | st.binary().map(lambda data: b'"usage":' + data + b'"usage": {"prompt_tokens"')
)
def test_no_bytes_make_it_fail(data: bytes) -> None:
    find_usage(data)
    assert USAGE_KEY in data or find_usage(data) is None


_STYLES = st.tuples(
    st.sampled_from([(",", ":"), (", ", ": "), (" ,", " : "), (",\n", ":\n")]), st.booleans()
)


@settings(max_examples=300)
@given(
    st.permutations(["prompt_tokens", "completion_tokens", "total_tokens"]),
    _COUNTS,
    st.dictionaries(st.text().filter(lambda key: key != "usage"), _JSON, max_size=3),
    st.text() | _SPOOFS,
    _STYLES,
)
def test_the_usage_of_any_answer_is_found_whatever_the_model_wrote(
    order: list[str],
    prompt: int,
    more: dict[str, Any],
    text: str,
    style: tuple[tuple[str, str], bool],
) -> None:
    counts = {"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7}
    usage = {name: counts[name] for name in order}
    separators, ascii_only = style
    answer = {"choices": [{"text": text}], "usage": usage, "text": text}
    more = {key: value for key, value in more.items() if "usage" not in json.dumps(value)}
    data = json.dumps({**more, **answer}, separators=separators, ensure_ascii=ascii_only)

    assert find_usage(data.encode(errors="replace")) == Usage(prompt, 7)


@pytest.mark.parametrize(
    ("data", "usage"),
    [
        (b"", None),
        (b'{"usage": null}', None),
        (b'{"usage": 3}', None),
        (b'{"usage": {}}', Usage(0, 0)),
        (b'{"usage": {"input_tokens": 3, "output_tokens": 4}}', Usage(3, 4)),
        (b'{"usage": {"prompt_tokens": -3, "completion_tokens": "4"}}', Usage(0, 0)),
        (b'{"usage": {"prompt_tokens": 3}} {"usage": null}', Usage(3, 0)),
        (b'{"usage": {"prompt_tokens": 3', None),
        (b'{"usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}", None),
        (b'{"usage": ' + b"[" * 5000, None),
        (b'"usage"', None),
    ],
)
def test_what_is_odd_or_cut_is_told_apart(data: bytes, usage: Usage | None) -> None:
    assert find_usage(data) == usage
