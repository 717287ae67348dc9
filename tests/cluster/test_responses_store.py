from __future__ import annotations

import types
from typing import Any

from cluster.engines.responses_store import BoundedStore, bound_store


def a_response(status: str = "completed") -> Any:
    return types.SimpleNamespace(status=status)


def test_the_oldest_responses_go_with_all_that_is_kept_of_them() -> None:
    messages: dict[str, Any] = {}
    events: dict[str, Any] = {}
    store = BoundedStore(messages, events, max_responses=3)
    for number in range(10):
        messages[f"r{number}"] = ["hi"]
        if number % 2:
            events[f"r{number}"] = ()
        store[f"r{number}"] = a_response()

    assert list(store) == list(messages) == ["r7", "r8", "r9"]
    assert list(events) == ["r7", "r9"]


def test_a_response_that_is_still_made_stays() -> None:
    store = BoundedStore(max_responses=2)
    store["slow"] = a_response("in_progress")
    store["next"] = a_response("queued")
    for number in range(5):
        store[f"r{number}"] = a_response()

    assert list(store) == ["slow", "next"]
    store["slow"] = a_response()
    store["r9"] = a_response()
    assert list(store) == ["next", "r9"]


def test_conversations_without_a_response_go_too() -> None:
    messages = {f"failed-{number}": ["hi"] for number in range(100)}
    store = BoundedStore(messages, max_responses=3)

    store["r"] = a_response()

    assert list(messages) == [f"failed-{number}" for number in range(94, 100)]


def test_a_server_gets_a_bounded_store_once() -> None:
    class Serving:
        def __init__(self, name: str) -> None:
            self.name = name
            self.response_store: dict[str, Any] = {}
            self.msg_store: dict[str, Any] = {}
            self.event_store: dict[str, Any] = {}

    module = types.ModuleType("serving")
    vars(module)["OpenAIServingResponses"] = Serving
    bound_store(module)
    wrapped = Serving.__init__
    bound_store(module)
    server = Serving("x")

    assert Serving.__init__ is wrapped
    assert server.name == "x"
    assert isinstance(server.response_store, BoundedStore)
