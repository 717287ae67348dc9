"""Call: one request for inference, the same whether it came by HTTP or gRPC."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.errors import BadRequest
from gateway.tenants import ANONYMOUS, HIGHEST_PRIORITY, Tenant

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FORWARDED = (
    *("accept", "anthropic-version", "anthropic-beta", "x-session-id"),
    *("traceparent", "tracestate"),
)
_PRINTABLE = re.compile(r"[\x20-\x7e]{1,8192}")
_LONGEST_TIMEOUT_S = 86400.0
_TIMEOUT = "x-request-timeout-s"
_PRIORITY = "x-bora-priority"


def _ids() -> Iterator[str]:
    """32 characters that nobody else gives out: random for the process, then a number."""
    while True:
        process = secrets.token_hex(12)
        for number in range(2**32):
            yield f"{process}{number:08x}"


_new_ids = _ids()


class _Routed(msgspec.Struct):
    """All that routing needs of a body; msgspec checks the rest without keeping it."""

    model: str


_routed = msgspec.json.Decoder(_Routed)


@dataclass(slots=True)
class Call:
    """What a client asks for, with the body as the client wrote it."""

    api: str
    path: str
    model: str
    body: bytes
    request_id: str
    headers: dict[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    tenant: Tenant = ANONYMOUS
    priority: int = ANONYMOUS.priority

    def body_for(self, served_model_name: str) -> bytes:
        """The body with the engine's name of the model; the client's own bytes if it is the same."""
        if served_model_name == self.model:
            return self.body
        return json.dumps({**parse_object(self.body), "model": served_model_name}).encode()


def make_call(
    api: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    request_id: str,
    *,
    tenant: Tenant = ANONYMOUS,
) -> Call:
    """A call from what a face received. `headers` are looked up by their lower-case names.

    Raises:
        BadRequest: no JSON object, no `model` in it, or a time limit or priority that makes no
            sense.
    """
    forwarded = {}
    for name in _FORWARDED:
        value = headers.get(name)
        if value and (value == "*/*" or _PRINTABLE.fullmatch(value)):
            forwarded[name] = value
    timeout_s = _timeout_s(headers[_TIMEOUT]) if _TIMEOUT in headers else None
    priority = tenant.priority
    if _PRIORITY in headers:
        priority = min(priority, _priority(headers[_PRIORITY]))
    return Call(api, path, model_of(body), body, request_id, forwarded, timeout_s, tenant, priority)


def model_of(body: bytes) -> str:
    """What a body's top-level `model` says; the last one, if there are several.

    msgspec reads it without building the rest. What msgspec refuses (a lone surrogate, NaN, or
    a mistake) is for `json` to judge, which also says what is wrong.

    Raises:
        BadRequest: no JSON object, or no `model` in it.
    """
    try:
        model: Any = _routed.decode(body).model
    except (msgspec.MsgspecError, RecursionError, ValueError):
        model = parse_object(body).get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("`model` is required and must be a non-empty string", param="model")
    return model


def parse_object(body: bytes) -> dict[str, Any]:
    """`body` as a JSON object.

    Raises:
        BadRequest: it is none, or nested too deeply to read.
    """
    try:
        value = json.loads(body.decode())
    except RecursionError:
        raise BadRequest("the body's JSON is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise BadRequest(f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def request_id(headers: Mapping[str, str]) -> str:
    """The client's `x-request-id` if it is short and plain, else a new one."""
    given = headers.get("x-request-id", "")
    return given if given and _SANE_REQUEST_ID.fullmatch(given) else next(_new_ids)


def _timeout_s(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _LONGEST_TIMEOUT_S:
        raise BadRequest(
            f"{_TIMEOUT} must be a number of seconds, more than 0 and at most"
            f" {_LONGEST_TIMEOUT_S:g}",
            param=_TIMEOUT,
        )
    return seconds


def _priority(given: str) -> int:
    """What a client may ask for: its key's priority, or less."""
    if not (given.isascii() and given.isdigit() and int(given[:3]) <= HIGHEST_PRIORITY):
        raise BadRequest(
            f"{_PRIORITY} must be a whole number from 0 (last) to {HIGHEST_PRIORITY} (first)",
            param=_PRIORITY,
        )
    return int(given)
