"""Builders for tests of routing: a router, what it is asked, and what comes of it."""

from __future__ import annotations

import json
from random import Random

from gateway.call import Call, make_call
from gateway.endpoints import Endpoint, ServedModel
from gateway.record import Record
from gateway.routing import Lease, Router
from gateway.usage import Usage
from tests.gateway.engines import CHAT, a_chat, a_table, an_endpoint


def a_router(*endpoints: Endpoint, seed: int = 0, **model: object) -> Router:
    router = Router(seed=seed)
    served = ServedModel(**{"name": "chat", **model})
    router.apply(a_table(*endpoints, models=(served,)))
    return router


def a_call(
    text: str = "hi", *, session: str | None = None, path: str = CHAT, **body: object
) -> Call:
    asked = a_chat(messages=[{"role": "user", "content": text}], **body)
    headers = {"x-session-id": session} if session else {}
    return make_call("http", path, json.dumps(asked).encode(), headers, "id")


def some_endpoints(count: int, **changes: object) -> list[Endpoint]:
    return [an_endpoint(f"http://{n}", **changes) for n in range(count)]


def url_of(lease: Lease) -> str:
    return lease.endpoint.url


def a_record(status: int = 200, *, out: int = 10) -> Record:
    record = Record(api="http", path=CHAT, request_id="id", status=status)
    record.usage = Usage(prompt_tokens=10, completion_tokens=out) if status == 200 else None
    return record


# Affinity


def a_long_text(seed: int, words: int = 800) -> str:
    random = Random(seed)
    return " ".join(str(random.randrange(10**6)) for _ in range(words))
