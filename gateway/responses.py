"""Stored responses of OpenAI's Responses API: what asks for one goes to the engine that holds it.

Engines keep their responses to themselves. Where an engine takes a response's id from the request
(vLLM does), the id tells the endpoint, `resp_<8 hexadecimal digits of its key>_<random>`, so that any
worker of any gateway finds it. Other engines' ids are remembered by the worker that saw them.

Where keys are asked for, a response is its tenant's alone: ids also tell a hash of the tenant's name
(an engine stores under no other id), and what is remembered has its owner. For all others it is 404.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import msgspec

from gateway.call import Call, make_call, parse_object
from gateway.endpoints import Endpoint, EndpointTable
from gateway.errors import BadRequest, GatewayError, NoSuchResponse, NoSuchRoute, Unavailable
from gateway.http_parser import Request
from gateway.plant import Client
from gateway.record import Record
from gateway.routes import RESPONSES_PATH, response_id_in
from gateway.tenants import ANONYMOUS, Tenant

_OURS = re.compile(r"resp_([0-9a-f]{8})_([0-9a-f]{16}|)[0-9a-f]{24}")
_ID_IN_BODY = re.compile(rb'"id" ?: ?"(resp_[A-Za-z0-9_-]{1,123})"')
_PLAIN_QUERY = re.compile(r"[A-Za-z0-9_.,:=&%+\[\]-]{0,1024}")
_MAX_IDS = 16_384
_SEARCHED_BYTES = 64 * 1024  # an id stands near the beginning, but an engine may sort its keys


class _FollowUp(msgspec.Struct):
    previous_response_id: str | None = None
    request_id: Any = None


_follow_up = msgspec.json.Decoder(_FollowUp)


class Table(Protocol):
    """Who knows the newest endpoint table."""

    table: EndpointTable | None


@dataclass(slots=True)
class ResponsesCall(Call):
    """`POST /v1/responses`: the response's id is to tell where it is stored."""

    def body_at(self, endpoint: Endpoint) -> bytes:
        """With an id of ours, where the engine takes one. A client's own `request_id` wins."""
        body = Call.body_at(self, endpoint)
        if endpoint.engine != "vllm":
            return body
        start = body.index(b"{") + 1
        owner = owner_digits(self.tenant)
        request_id = f"resp_{holder_digits(endpoint.key)}_{owner}{secrets.token_hex(12)}"
        return b'%b"request_id":"%b",%b' % (body[:start], request_id.encode(), body[start:])


class StoredResponses:
    """Makes calls of the Responses API, and knows which endpoint holds a response."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._seen: OrderedDict[str, tuple[str, str]] = OrderedDict()  # id -> endpoint, owner

    def make_call(self, request: Request, request_id: str, tenant: Tenant = ANONYMOUS) -> Call:
        """The call of `tenant` for any request at or under `/v1/responses`.

        Raises:
            BadRequest: as `gateway.call.make_call`, or a query that no engine has.
            NoSuchRoute: no path of the Responses API.
            NoSuchResponse: no endpoint is known to hold the response that it is about, or it is
                another tenant's.
        """
        head = request.head
        if head.path == RESPONSES_PATH:
            call = make_call("http", head.path, request.body, head.headers, request_id)
            pinned = self._followed(call, tenant)
            return ResponsesCall(
                call.api, call.path, call.model, call.body, call.request_id, call.headers,
                call.lines, call.timeout_s, call.is_stream, call.max_tokens,
                endpoint_key=pinned.key if pinned else None, priority=call.priority,
            )  # fmt: skip
        response_id = response_id_in(head.path)
        if response_id is None:
            raise NoSuchRoute(f"there is no {head.path[:200]}")
        if not _PLAIN_QUERY.fullmatch(head.query):
            raise BadRequest("the query holds characters that no parameter of this path has")
        holder = self._holder(response_id, tenant)
        target = f"{head.path}?{head.query}" if head.query else head.path
        call = make_call("http", target, request.body, head.headers, request_id, model=holder.model)
        call.method, call.endpoint_key = head.method.decode(), holder.key
        return call

    def note(self, call: Call, record: Record, body: bytes) -> bool:
        """Remember where a response is stored if its id, once it is in `body`, does not tell."""
        if call.path != RESPONSES_PATH:
            return True
        found = _ID_IN_BODY.search(body, 0, _SEARCHED_BYTES)
        if found is None:
            return False
        response_id = found[1].decode()
        ours = _OURS.fullmatch(response_id)
        if ours is None or ours[1] != holder_digits(record.endpoint):
            self._seen[response_id] = record.endpoint, owner_digits(call.tenant)
            self._seen.move_to_end(response_id)
            if len(self._seen) > _MAX_IDS:
                self._seen.popitem(last=False)
        return True

    def _followed(self, call: Call, tenant: Tenant) -> Endpoint | None:
        """Who holds the response that `call` continues; None: it continues none."""
        previous, wants_id = _follow_up_of(call.body)
        if wants_id and tenant is not ANONYMOUS:
            raise BadRequest(
                "`request_id` cannot be chosen here: it would be the response's id, which tells"
                " whose it is; leave it out",
                param="request_id",
            )
        return None if previous is None else self._holder(previous, tenant, call.model)

    def _holder(self, response_id: str, tenant: Tenant, model: str | None = None) -> Endpoint:
        if self._table.table is None:
            raise Unavailable("the gateway has no endpoint table yet", retry_after_s=1)
        endpoints = self._table.table.endpoints
        ours = _OURS.fullmatch(response_id)
        key, owner = self._seen.get(response_id) or ("", ours[2] if ours else "")
        if owner == owner_digits(tenant) or tenant is ANONYMOUS:
            held = [
                endpoint
                for endpoint in endpoints
                if endpoint.key == key or (ours and holder_digits(endpoint.key) == ours[1])
            ]
            if held:  # of a model and its adapters there, one that is for this tenant
                return next((each for each in held if tenant.may_use((each.model,))), held[0])
            if only := tenant is ANONYMOUS and _only(endpoints, model):
                return only  # it knows best what it has
        raise NoSuchResponse(
            f"no engine is known to hold the response {response_id[:200]!r}: it was not stored, or"
            " its replica is gone; send the conversation as `input` instead",
            param="previous_response_id" if model else "response_id",
        )


class Noting:
    """A client between: passes everything on, and looks at it until an id was found."""

    def __init__(self, stored: StoredResponses, call: Call, to: Client) -> None:
        self.record = Record("", "", "")
        self._stored, self._call, self._to = stored, call, to
        self._found = False

    write_chunks = None  # it looks at what passes

    def whole(self, status: int, headers: bytes, body: bytes) -> None:
        """See `gateway.plant.Client`, as for what follows."""
        self._stored.note(self._call, self.record, body)
        self._to.whole(status, headers, body)

    def start(self, status: int, headers: bytes, *, is_event_stream: bool) -> None:  # noqa: D102
        self._to.start(status, headers, is_event_stream=is_event_stream)

    def write(self, data: bytes) -> None:  # noqa: D102
        if not self._found:
            self._found = self._stored.note(self._call, self.record, data)
        self._to.write(data)

    def finish(self) -> None:  # noqa: D102
        self._to.finish()

    def fail(self, error: GatewayError) -> None:  # noqa: D102
        self._to.fail(error)


@lru_cache(maxsize=4096)
def holder_digits(endpoint_key: str) -> str:
    """What an id says of the endpoint that holds the response."""
    return hashlib.sha256(endpoint_key.encode()).hexdigest()[:8]


@lru_cache(maxsize=4096)
def _digits_of_name(tenant: str) -> str:
    return hashlib.sha256(b"tenant " + tenant.encode()).hexdigest()[:16]


def owner_digits(tenant: Tenant) -> str:
    """What an id says of the tenant whose response it is; nothing where nobody needs a key."""
    return "" if tenant is ANONYMOUS else _digits_of_name(tenant.name)


def _only(endpoints: Iterable[Endpoint], model: str | None) -> Endpoint | None:
    named = [e for e in endpoints if model is None or e.model == model]
    return named[0] if len({endpoint.key for endpoint in named}) == 1 else None


def _follow_up_of(body: bytes) -> tuple[str | None, bool]:
    """The response that a body continues, and whether it asks for an id of its own."""
    previous: Any
    try:
        asked = _follow_up.decode(body)
        previous, wanted = asked.previous_response_id, asked.request_id
    except (msgspec.MsgspecError, RecursionError, ValueError):
        value = parse_object(body)
        previous, wanted = value.get("previous_response_id"), value.get("request_id")
    if previous is not None and (not isinstance(previous, str) or not previous):
        raise BadRequest(
            "`previous_response_id` must be a response's id", param="previous_response_id"
        )
    return previous, wanted is not None
