"""The published description of the HTTP API (OpenAPI 3.1), made from the route table and our types.

Engines know what is in a body and an answer; described here is what the gateway itself reads and
says, and everything else is let through.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from gateway.bodies import (
    ErrorBody,
    FollowUpBody,
    ModelCard,
    ModelList,
    RoutedBody,
    StatusBody,
)
from gateway.call import LONGEST_TIMEOUT_S, TIMEOUT
from gateway.http_response import json_body
from gateway.routes import FORWARDED, OWN, RESPONSE_ID, RESPONSES_PATH, STORED, Route

_REF = "#/components/schemas/{model}"
_SCHEMAS = {
    "ErrorBody": ErrorBody,
    "FollowUpBody": FollowUpBody,
    "ModelCard": ModelCard,
    "ModelList": ModelList,
    "RoutedBody": RoutedBody,
    "StatusBody": StatusBody,
}
_OWN_SCHEMAS = {
    "/v1/models": "ModelList",
    "/v1/models/{model}": "ModelCard",
    "/health": "StatusBody",
    "/ready": "StatusBody",
}
_ANYTHING = {"type": "object", "additionalProperties": True}
_PARAMETERS = {
    "response_id": {"type": "string", "pattern": f"^{RESPONSE_ID}$"},
    "model": {"type": "string", "minLength": 1, "description": "A name or an alias."},
}


@cache
def document() -> bytes:
    """The document as JSON."""
    return json_body(openapi())


def openapi() -> dict[str, Any]:
    """The document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bora gateway",
            "version": importlib.metadata.version("bora"),
            "description": "OpenAI's and Anthropic's HTTP APIs in front of many engines.",
        },
        "paths": {route.path: _path_item(route) for route in (*FORWARDED, *STORED, *OWN)},
        "components": {"schemas": _schemas()},
    }


def _path_item(route: Route) -> dict[str, Any]:
    item: dict[str, Any] = {method.lower(): _operation(route, method) for method in route.methods}
    if named := [name for name in _PARAMETERS if f"{{{name}}}" in route.path]:
        item["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _PARAMETERS[name]}
            for name in named
        ]
    return item


def _operation(route: Route, method: str) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": route.summary}
    responses = {"200": {"description": "Done.", **_content(route, method)}}
    problem = {} if method == "HEAD" else {"content": _json_content(_ref("ErrorBody"))}
    responses["4XX"] = {"description": "The request cannot be met as it is.", **problem}
    responses["5XX"] = {"description": "Not now, or the engine failed.", **problem}
    operation["responses"] = responses
    if route not in OWN:
        operation["parameters"] = _headers()
    if route in FORWARDED:
        form = "FollowUpBody" if route.path == RESPONSES_PATH else "RoutedBody"
        operation["requestBody"] = {"required": True, "content": _json_content(_ref(form))}
    return operation


_TEXTS = {"/metrics": "text/plain", "/console": "text/html"}


def _content(route: Route, method: str) -> dict[str, Any]:
    """What comes back, without the headers."""
    if method == "HEAD":
        return {}
    if route.path in _TEXTS:
        return {"content": {_TEXTS[route.path]: {"schema": {"type": "string"}}}}
    schema = _OWN_SCHEMAS.get(route.path)
    content = _json_content(_ref(schema) if schema else _ANYTHING)
    if route.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"content": content}


def _headers() -> list[dict[str, Any]]:
    """What a client may tell beside the body."""
    limit = {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_TIMEOUT_S}
    text = {"type": "string"}
    described = (
        (TIMEOUT, limit, "Seconds after which the request ends with 504."),
        ("x-request-id", text, "Comes back, and goes to the engine, if it is short and plain."),
        ("x-session-id", text, "Requests of one session go to the same engine while it can."),
        ("traceparent", text, "W3C trace context."),
    )
    return [
        {"name": name, "in": "header", "required": False, "schema": schema, "description": told}
        for name, schema, told in described
    ]


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for name, form in _SCHEMAS.items():
        schema = TypeAdapter[Any](form).json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[name] = schema
    return schemas


def _json_content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}
