"""The paths of the HTTP API: one table for dispatch and for the published document."""

from __future__ import annotations

import re
from dataclasses import dataclass

RESPONSES_PATH = "/v1/responses"
RESPONSE_ID = "[A-Za-z0-9_-]{1,128}"
MODEL_PATH = "/v1/models/"

_POST = ("POST",)
_GET = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Route:
    """One path. `{response_id}` is one segment of it, `{model}` all that is left."""

    path: str
    methods: tuple[str, ...]
    summary: str
    streams: bool = False  # with `stream: true`, as events


# Passed through to engines, which know what they mean; only `model` is ours.
FORWARDED = (
    Route("/v1/chat/completions", _POST, "Continue a conversation", streams=True),
    Route("/v1/completions", _POST, "Continue a text", streams=True),
    Route("/v1/embeddings", _POST, "Turn texts into vectors"),
    Route(RESPONSES_PATH, _POST, "OpenAI's Responses", streams=True),
    Route(f"{RESPONSES_PATH}/input_tokens", _POST, "Count the tokens of a response's input"),
    Route("/v1/messages", _POST, "Anthropic's Messages", streams=True),
    Route("/v1/messages/count_tokens", _POST, "Count the tokens of Anthropic's messages"),
    Route("/v1/rerank", _POST, "Order documents by their relevance for a query"),
    Route("/v1/score", _POST, "Tell how similar texts are"),
    Route("/rerank", _POST, "The same as /v1/rerank"),
    Route("/score", _POST, "The same as /v1/score"),
    Route("/classify", _POST, "Sort texts into a model's classes"),
    Route("/pooling", _POST, "A pooling model's raw output"),
    Route("/tokenize", _POST, "Turn text into tokens"),
    Route("/detokenize", _POST, "Turn tokens into text"),
)
# To the one engine that holds the response.
STORED = (
    Route(f"{RESPONSES_PATH}/{{response_id}}", ("GET", "DELETE"), "A stored response"),
    Route(f"{RESPONSES_PATH}/{{response_id}}/input_items", ("GET",), "What it was asked"),
    Route(f"{RESPONSES_PATH}/{{response_id}}/cancel", _POST, "End a response in the background"),
)
OWN = (
    Route("/v1/models", _GET, "Every model, with aliases, context length and capabilities"),
    Route(f"{MODEL_PATH}{{model}}", _GET, "One model, by its name or an alias"),
    Route("/health", _GET, "The gateway lives"),
    Route("/ready", _GET, "The gateway has an endpoint table and takes requests"),
    Route("/metrics", _GET, "Prometheus metrics"),
    Route("/console", _GET, "A page that shows models, endpoints and what they do"),
    Route("/console/data", _GET, "The numbers behind /console"),
    Route("/openapi.json", _GET, "This document"),
)
FORWARDED_PATHS = tuple(route.path for route in FORWARDED)

_METHODS = {route.path: route.methods for route in (*FORWARDED, *OWN)}
_STORED_METHODS = {route.path.partition("}")[2]: route.methods for route in STORED}
_STORED_PATH = re.compile(
    rf"{RESPONSES_PATH}/(?P<id>{RESPONSE_ID})(?P<rest>/input_items|/cancel|)", re.ASCII
)


def methods_of(path: str) -> tuple[str, ...] | None:
    """The methods that `path` takes; None: there is no such path."""
    methods = _METHODS.get(path) or stored_methods(path)
    if methods is None and path.startswith(MODEL_PATH) and len(path) > len(MODEL_PATH):
        return _GET
    return methods


def stored_methods(path: str) -> tuple[str, ...] | None:
    """The methods that `path` takes if it is about one stored response."""
    found = _STORED_PATH.fullmatch(path)
    return _STORED_METHODS[found["rest"]] if found and path not in _METHODS else None


def response_id_in(path: str) -> str | None:
    """The stored response that `path` is about."""
    found = _STORED_PATH.fullmatch(path)
    return found["id"] if found and path not in _METHODS else None
