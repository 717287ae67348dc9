"""An engine without the path that a client asks for: told in our words instead of the engine's."""

from __future__ import annotations

import json
from http import HTTPStatus

from gateway.errors import NotSupported
from gateway.record import Record

# FastAPI (vLLM, SGLang) and llama.cpp, for any path that they do not have.
_BARE = frozenset(("Not Found", "Method Not Allowed", "File Not Found"))
_LONGEST_BARE_BYTES = 256


def refuse_if_missing(status: int, body: bytes, record: Record) -> None:
    """Pass by every answer but an engine's bare "no such path".

    Raises:
        NotSupported: the engine has no such path.
    """
    is_bare = status in {404, 405} and len(body) <= _LONGEST_BARE_BYTES and _told(body) in _BARE
    if not is_bare and status != HTTPStatus.NOT_IMPLEMENTED:  # llama.cpp, of vectors
        return
    path = record.path.partition("?")[0][:200]
    raise NotSupported(
        f"the engine that serves the model {record.model!r} has no {path} for this kind of request:"
        " ask a model whose engine has it"
    )


def _told(body: bytes) -> str | None:
    try:
        value = json.loads(body)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    error = value.get("error")
    told = error.get("message") if isinstance(error, dict) else value.get("detail")
    return told if isinstance(told, str) else None
