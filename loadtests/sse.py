"""What a client sees of a stream: server-sent events, their times, and whether it ended well.

Pure: bytes and times go in, so it is the same under gevent, asyncio and in tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event."""

    data: str
    name: str = "message"


class EventReader:
    """Turns the bytes of a `text/event-stream`, however they are cut, into events."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = [self._line(line.removesuffix(b"\r").decode(errors="replace")) for line in lines]
        return [event for event in events if event]

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        key, _, value = line.partition(":")  # a comment has an empty key
        value = value.removeprefix(" ")
        if key == "data":
            self._data.append(value)
        elif key == "event":
            self._name = value
        return None

    def _dispatch(self) -> Event | None:
        name, data = self._name, self._data
        self._name, self._data = "", []
        return Event("\n".join(data), name or "message") if data else None


@dataclass(slots=True)
class StreamRecord:
    """Book-keeping of one streamed answer, sent at `start_s`. Times are of any one clock, seconds.

    A chunk counts as one token arrival if it carries text, reasoning or a part of a tool call.
    """

    start_s: float
    ttft_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    _last_s: float = 0.0
    _done: bool = False
    _error: str | None = None

    def observe(self, event: Event, now_s: float) -> None:
        """Note `event`, which arrived at `now_s`."""
        if event.data == DONE:
            self._done = True
            return
        try:
            body = json.loads(event.data)
        except ValueError:
            self._error = self._error or f"an event is not JSON: {event.data[:200]}"
            return
        if not isinstance(body, dict) or event.name == "error" or body.get("error"):
            self._error = self._error or f"error event: {event.data[:200]}"
            return
        for choice in body.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if _has_content(choice):
                self._token(now_s)

    @property
    def failure(self) -> str | None:
        """Why the stream, which is at its end now, is not a whole answer; None: it is one."""
        if self._error:
            return self._error
        if self.ttft_s is None:
            return "the stream ended without any content"
        if self.finish_reason is None:
            return "the stream ended without finish_reason"
        if not self._done:
            return f"the stream ended without {DONE}"
        return None

    def _token(self, now_s: float) -> None:
        if self.ttft_s is None:
            self.ttft_s = now_s - self.start_s
        else:
            self.itl_s.append(now_s - self._last_s)
        self._last_s = now_s


def answer_failure(body: bytes) -> str | None:
    """Why an answer that was not streamed is not a whole one; None: it is one."""
    if not body:
        return "the body is empty"
    try:
        value = json.loads(body)
    except ValueError:
        return f"the body is not JSON: {body[:200].decode(errors='replace')}"
    choices = value.get("choices") if isinstance(value, dict) else None
    if not choices:
        return f"the body holds no choices: {body[:200].decode(errors='replace')}"
    if not choices[0].get("finish_reason"):
        return "the answer has no finish_reason"
    if not _has_content(choices[0]):
        return "the answer is empty"
    return None


def _has_content(choice: dict[str, Any]) -> bool:
    said = choice.get("delta") or choice.get("message") or choice
    return any(
        said.get(key) for key in ("content", "text", "reasoning_content", "reasoning", "tool_calls")
    )
