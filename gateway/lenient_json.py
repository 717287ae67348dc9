"""JSON by msgspec, and by `json` where msgspec is stricter: lone surrogates, NaN, huge integers."""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii
from typing import Any

import msgspec

_decoder = msgspec.json.Decoder()


def read_json(data: bytes) -> Any:
    """What `data` says.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        try:
            return json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None


def json_bytes(value: dict[str, Any]) -> bytes:
    """JSON of `value`, without blanks where it can be."""
    try:
        return msgspec.json.encode(value)
    except (ValueError, OverflowError, msgspec.MsgspecError):
        return json.dumps(value).encode()


def quoted(text: str) -> bytes:
    """`text` as inside of a JSON string."""
    return encode_basestring_ascii(text)[1:-1].encode()
