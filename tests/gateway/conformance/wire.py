"""What came over the wire, without what differs between two answers to the same request."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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


@dataclass
class Regrouped:
    """Events whatever pieces a text came in: vLLM sends what is there when it gets to it.

    The kinds of events in their order, everything that they say, and each text put together.
    """

    kinds: list[tuple[str, str]] = field(default_factory=list)
    facts: set[tuple[str, ...]] = field(default_factory=set)
    texts: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def add(self, value: Any, path: tuple[str, ...]) -> None:
        if _is_piece(value, path):
            self.texts[path] = self.texts.get(path, type(value)()) + value
        elif isinstance(value, dict):
            for name, part in value.items():
                self.add(part, (*path, name))
        elif isinstance(value, list):
            for part in value:
                self.add(part, path)
        else:
            self.facts.add((*path, repr(value)))


def regrouped(events: list[tuple[str, Any]]) -> Regrouped:
    told = Regrouped()
    for name, data in events:
        kind = (name, str(data["type"]) if "type" in data else "")
        if told.kinds[-1:] != [kind]:
            told.kinds.append(kind)
        told.add(data, kind)
    return told


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
