"""What came over the wire, without what differs between two answers to the same request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import aiohttp

# Made up anew for every answer, or measured.
_MADE_UP = frozenset(
    ("created", "created_at", "completed_at", "timings", "cached_tokens", "sequence_number")
)
_TEXTS = frozenset(("content", "text", "arguments", "delta", "partial_json"))
_IDS = frozenset(("id", "item_id", "call_id", "response_id"))


@dataclass(frozen=True, slots=True)
class Told:
    """An answer: JSON, or events in their order, each with its name."""

    status: int
    content_type: str
    body: Any


async def ask(
    session: aiohttp.ClientSession, url: str, body: Any, *, key: str | None = None
) -> Told:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with session.post(url, json=body, headers=headers) as answer:
        content_type = answer.headers["content-type"]
        text = await answer.text()
    if content_type.startswith("text/event-stream"):
        return Told(answer.status, content_type, [_event(e) for e in text.split("\n\n")])
    return Told(answer.status, content_type, normalised(json.loads(text)))


def regrouped(events: list[tuple[str, Any]]) -> tuple[list[Any], dict[tuple[str, ...], Any]]:
    """Events whatever pieces a text came in: vLLM sends what is there when it gets to it.

    The kinds of events in their order, and the text (or the tokens) of each kind put together.
    """
    kinds: list[Any] = []
    pieces: dict[tuple[str, ...], Any] = {}
    for name, data in events:
        path = (name, str(data["type"]) if "type" in data else "")
        kind = (name, _without_pieces(data, path, pieces))
        if not kinds or kinds[-1] != kind:
            kinds.append(kind)
    return kinds, pieces


def _without_pieces(value: Any, path: tuple[str, ...], pieces: dict[tuple[str, ...], Any]) -> Any:
    if isinstance(value, list):
        return [_without_pieces(part, path, pieces) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, part in value.items():
        here = (*path, name)
        if _is_piece(part, here):
            pieces[here] = pieces.get(here, type(part)()) + part
        else:
            kept[name] = _without_pieces(part, here, pieces)
    return kept


def _is_piece(value: Any, path: tuple[str, ...]) -> bool:
    if isinstance(value, str):
        return path[-1] in _TEXTS
    return isinstance(value, list) and path[-2:] == ("logprobs", "content")


def normalised(value: Any, key: str = "") -> Any:
    """`value` with `*` for ids, times and measurements: that they are there still counts."""
    if key in _MADE_UP or (key in _IDS and isinstance(value, str)):
        return "*"
    if isinstance(value, dict):
        if "cache_read_input_tokens" in value:  # how many of its prompt an engine knew already
            read = value["cache_read_input_tokens"]
            value = {**value, "input_tokens": read + value["input_tokens"]}
            value["cache_read_input_tokens"] = "*"
        return {name: normalised(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [normalised(part, key) for part in value]
    return value


def _event(text: str) -> tuple[str, Any]:
    name, _, data = text.rpartition("data: ")
    if not data.startswith("{"):
        return name, data
    return name, normalised(json.loads(data))
