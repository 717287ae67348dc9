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

from gateway.endpoints import Endpoint
from gateway.errors import BadRequest
from gateway.tenants import ANONYMOUS, HIGHEST_PRIORITY, Tenant

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FORWARDED = (
    *("accept", "anthropic-version", "anthropic-beta", "x-session-id"),
    *("traceparent", "tracestate"),
)
_PRINTABLE = re.compile(r"[\x20-\x7e]{1,8192}")
LONGEST_TIMEOUT_S = 86400.0
TIMEOUT = "x-request-timeout-s"
PRIORITY = "x-bora-priority"
_MAX_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


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
    stream: Any = False
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None


_routed = msgspec.json.Decoder(_Routed)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request's headers say. Clients repeat theirs, so it is worth keeping."""

    forwarded: dict[str, str]  # never changed
    lines: bytes  # the same, as HTTP has it
    timeout_s: float | None
    priority: int | None  # no more than this


def terms_of(headers: Mapping[str, str]) -> Terms:
    """What `headers` say, which are looked up by their lower-case names.

    Raises:
        BadRequest: a time limit or a priority that makes no sense.
    """
    forwarded = {}
    for name in _FORWARDED:
        value = headers.get(name)
        if value and (value == "*/*" or _PRINTABLE.fullmatch(value)):
            forwarded[name] = value
    return Terms(
        forwarded,
        header_lines(forwarded),
        _timeout_s(headers[TIMEOUT]) if TIMEOUT in headers else None,
        _priority(headers[PRIORITY]) if PRIORITY in headers else None,
    )


def header_lines(headers: Mapping[str, str]) -> bytes:
    """As HTTP has them. They hold no line breaks: `terms_of` and tracing see to that."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()


@dataclass(slots=True)
class Call:
    """What a client asks for, with the body as the client wrote it."""

    api: str
    path: str
    model: str
    body: bytes
    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)  # that the engine gets
    lines: bytes = b""  # the same, as HTTP has it
    timeout_s: float | None = None
    is_stream: bool = False
    max_tokens: int | None = None  # that the engine may answer with, if the body tells
    method: str = "POST"
    endpoint_key: str | None = None  # the one endpoint that can answer; None: any of the model's
    tenant: Tenant = ANONYMOUS
    priority: int = HIGHEST_PRIORITY

    def belongs_to(self, tenant: Tenant) -> None:
        """`tenant` asks, with its priority or, if `x-bora-priority` says so, a lower one."""
        self.tenant = tenant
        self.priority = min(tenant.priority, self.priority)

    def body_at(self, endpoint: Endpoint) -> bytes:
        """The body for the engine at `endpoint`."""
        return self.body_for(endpoint.served_model_name or endpoint.model)

    def body_for(self, served_model_name: str) -> bytes:
        """The body with the engine's name of the model; the client's own bytes if it is the same."""
        if served_model_name == self.model or not self.body:
            return self.body
        return json.dumps({**parse_object(self.body), "model": served_model_name}).encode()

    @property
    def wants_ids(self) -> bool:
        """Whether the client itself asked for token ids, or refused them."""
        return b'"return_token_ids"' in self.body


def make_call(
    api: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    request_id: str,
    *,
    model: str | None = None,
) -> Call:
    """A call from what a face received. `headers` are looked up by their lower-case names.

    `model` is told where the body does not name it.

    Raises:
        BadRequest: no JSON object, no `model` in it, or a header that makes no sense.
    """
    return new_call(api, path, body, terms_of(headers), request_id, model=model)


def new_call(
    api: str, path: str, body: bytes, terms: Terms, request_id: str, *, model: str | None = None
) -> Call:
    """As `make_call`, when the headers have been looked at."""
    is_stream, max_tokens = False, None
    if model is None:
        model, is_stream, max_tokens = _routed_of(body)
    call = Call(
        *(api, path, model, body, request_id),
        *(terms.forwarded, terms.lines, terms.timeout_s, is_stream, max_tokens),
    )
    if terms.priority is not None:
        call.priority = terms.priority
    return call


def _routed_of(body: bytes) -> tuple[str, bool, int | None]:
    """What a body says of its model, whether to stream, and the most tokens of an answer.

    Of a name that stands twice the last counts. msgspec reads them without building the rest. What
    msgspec refuses (a lone surrogate, NaN, or a mistake) is for `json` to judge, which also says
    what is wrong.

    Raises:
        BadRequest: no JSON object, or no `model` in it.
    """
    model: Any
    try:
        routed = _routed.decode(body)
        model, stream = routed.model, routed.stream
        most = routed.max_completion_tokens or routed.max_tokens or routed.max_output_tokens
    except (msgspec.MsgspecError, RecursionError, ValueError):
        value = parse_object(body)
        model, stream = value.get("model"), value.get("stream")
        most = next((value[name] for name in _MAX_TOKENS if value.get(name)), None)
    if not isinstance(model, str) or not model:
        raise BadRequest("`model` is required and must be a non-empty string", param="model")
    return model, stream is True, most if isinstance(most, int) and most > 0 else None


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
    if not 0 < seconds <= LONGEST_TIMEOUT_S:
        raise BadRequest(
            f"{TIMEOUT} must be a number of seconds, more than 0 and at most {LONGEST_TIMEOUT_S:g}",
            param=TIMEOUT,
        )
    return seconds


def _priority(given: str) -> int:
    if not (given.isascii() and given.isdigit() and int(given[:3]) <= HIGHEST_PRIORITY):
        raise BadRequest(
            f"{PRIORITY} must be a whole number from 0 (last) to {HIGHEST_PRIORITY} (first)",
            param=PRIORITY,
        )
    return int(given)
