"""llama.cpp's dialect: where its API differs from vLLM's, so that clients of a model see one. Pure.

/v1/completions   without `max_tokens` it would go on to the end of the context; OpenAI and vLLM: 16
/tokenize         knows `content` only, and takes a prompt for no text at all; tells no count
/detokenize       tells `content`
500               is said of mistakes in a request too (a chat template's refusal, images for a model
                  that sees none); and when the KV cache is full, which vLLM has a queue for

repeat_last_n     and the like are memory that it takes at once, before it does anything else: 2e9 of
                  them are 8 GB and stop all its requests for seconds

Whoever asks in llama.cpp's own words is answered in them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from gateway.answer import Answer
from gateway.bodies import Error, ErrorBody
from gateway.errors import BadRequest
from gateway.lenient_json import json_bytes, read_json
from gateway.routing import Lease

COMPLETION_PATH = "/v1/completions"
TOKENIZE_PATH, DETOKENIZE_PATH = "/tokenize", "/detokenize"
_COUNT_PATH = "/v1/chat/completions/input_tokens"
_COMPLETION_MAX_TOKENS = b',"max_tokens":16}'
_LIMITS = (b'"max_tokens"', b'"n_predict"', b'"max_completion_tokens"')
CACHE_IS_FULL = "Context size has been exceeded"
# What it says of its own failures (server-context.cpp, send_error of decode()); its other 500s are
# exceptions while it reads a request.
_FAILURES = ("Compute error", "Invalid input batch", "decode() failed", "failed to process")
_LONGEST_LOOK_BACK_TOKENS = 1 << 20


class _LooksBack(msgspec.Struct):
    """How many tokens samplers look back."""

    repeat_last_n: Any = None
    dry_penalty_last_n: Any = None


_looks_back = msgspec.json.Decoder(_LooksBack)


def asked(path: str, body: bytes) -> tuple[str, bytes]:
    """Path and body for llama.cpp of a request in vLLM's form; `body` is a JSON object.

    Raises:
        BadRequest: it would take so much memory that others suffer.
    """
    _refuse_to_look_far_back(body)
    if path == TOKENIZE_PATH:
        return _to_count(body)
    if path == COMPLETION_PATH and not any(name in body for name in _LIMITS):
        return path, body.rstrip()[:-1] + _COMPLETION_MAX_TOKENS
    return path, body


def _refuse_to_look_far_back(body: bytes) -> None:
    try:
        far = msgspec.structs.asdict(_looks_back.decode(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        far = {name: _object(body).get(name) for name in _LooksBack.__struct_fields__}
    for name, tokens in far.items():
        if isinstance(tokens, (int, float)) and tokens > _LONGEST_LOOK_BACK_TOKENS:
            raise BadRequest(
                f"`{name}` is {tokens:g}; give at most {_LONGEST_LOOK_BACK_TOKENS}", param=name
            )


def _to_count(body: bytes) -> tuple[str, bytes]:
    value = _object(body)
    if isinstance(value.get("messages"), list):
        return _COUNT_PATH, body
    if "content" in value or not isinstance(value.get("prompt"), str):
        return TOKENIZE_PATH, body
    value["content"] = value.pop("prompt")
    value["add_special"] = value.get("add_special_tokens", True)
    value["with_pieces"] = bool(value.get("return_token_strs"))
    return TOKENIZE_PATH, json_bytes(value)


def told(path: str, status: int, body: bytes, max_model_len: int | None) -> tuple[int, bytes]:
    """Status and body for the client of llama.cpp's whole answer to a request for `path`."""
    if status == 500:
        return _blame(body)
    if status == 200 and path in {TOKENIZE_PATH, DETOKENIZE_PATH}:
        return status, json_bytes(_counted(_object(body), max_model_len))
    return status, body


def translated(answer: Answer, body: bytes, path: str, lease: Lease | None) -> tuple[Answer, bytes]:
    """All of a JSON answer of the engine at `lease` as vLLM would give it."""
    if lease is None or lease.state.engine != "llamacpp":
        return answer, body
    status, body = told(path, answer.status, body, lease.state.max_model_len)
    if status != answer.status:  # what is known of such answers stays as it is
        answer = replace(answer, status=status, lines=None)
    return answer, body


def _counted(value: dict[str, Any], max_model_len: int | None) -> dict[str, Any]:
    """What vLLM tells beside what llama.cpp tells. Of messages only the count is known."""
    if "content" in value:
        return {"prompt": value["content"], **value}
    tokens = value.get("tokens")
    if tokens is None:
        count = value.pop("input_tokens", 0)
        return {"count": count, "max_model_len": max_model_len, "tokens": None}
    more: dict[str, Any] = {"count": len(tokens), "max_model_len": max_model_len}
    return {**more, **value}


def _blame(body: bytes) -> tuple[int, bytes]:
    """Whose fault a 500 is: the engine's, that of too many long requests at once, or the client's."""
    error = _object(body).get("error")
    message = error.get("message") if isinstance(error, dict) else None
    if not isinstance(message, str) or message.startswith(_FAILURES):
        return 500, body
    if message.startswith(CACHE_IS_FULL):
        return 503, _error_body(message, "server_error", 503)
    return 400, _error_body(message, "invalid_request_error", 400)


def _error_body(message: str, kind: str, code: int) -> bytes:
    error: Error = {"message": message, "type": kind, "param": None, "code": code}
    told: ErrorBody = {"error": error}
    return json_bytes({**told})


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = read_json(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
