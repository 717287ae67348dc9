"""Transcript: what a stream of chat or completion chunks has said, so that another engine can go on.

vLLM tells the ids of the tokens when asked (`return_token_ids`): they make a continuation exact. They
are taken out again on the way to a client that did not ask, byte for byte as if nobody had.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gateway.lenient_json import quoted, read_json

_HIDDEN = b'"token_ids":null'
_ANY_IDS = re.compile(rb'"(prompt_)?token_ids": ?\[([\d, ]*)\]')
_BACKSLASH = 0x5C
_ABORT = "abort"  # vLLM's own reason for an end that nobody asked for
_CHUNK_NAMES = ("id", "object", "created", "model")


@dataclass(frozen=True, slots=True)
class Again:
    """What an engine that goes on makes a second time: so many tokens, and this of their text."""

    num_tokens: int = 0
    text: str = ""


class Transcript:
    """Fed with whole events. `fault` is set once an event tells of an engine that failed.

    Tokens whose text is not out yet (half of a character) are `num_pending`.
    """

    __slots__ = (
        *(
            "_finish_mark",
            "_ids",
            "_ids_mark",
            "_mark",
            "_num_held",
            "_num_out",
            "_num_sent",
            "_only_ids",
        ),
        *("_said", "_steps", "blocked", "done", "fault", "finished", "head", "hides_ids"),
        *("num_pending", "num_tokens", "prompt_ids", "reasoned", "usage_sent"),
    )

    def __init__(self, *, is_chat: bool, hides_ids: bool, num_held: int = 0) -> None:
        """`num_held`: characters that the engine holds back, as they may begin a stop string."""
        self._mark = b'"content":"' if is_chat else b'"text":"'
        self._ids_mark, self._finish_mark = b'"token_ids":[', b'"finish_reason":"'
        self._ids = bytearray()
        self._said = bytearray()
        self._num_held = num_held
        self._num_out = 0  # characters that engines have let out, where some are held back
        self._steps: list[tuple[int, int]] = []  # then: after so many tokens, so many characters
        self._only_ids = False  # the event has nothing else to tell
        self._num_sent = 0  # tokens that the client has seen chunks of
        self.hides_ids = hides_ids
        self.head: dict[str, Any] | None = None
        self.prompt_ids: bytes | None = None
        self.num_tokens = 0
        self.num_pending = 0
        self.finished = self.usage_sent = self.done = self.reasoned = False
        self.blocked: str | None = None
        self.fault: str | None = None

    @property
    def text(self) -> str:
        """All that the client has read."""
        return _unquoted(bytes(self._said))

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        return [int(item) for item in self._ids.split(b",") if item]

    @property
    def is_exact(self) -> bool:
        """The engine told every token, those of the prompt too."""
        return self.prompt_ids is not None and self._ids.count(b",") == self.num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """0 if the engine did not tell."""
        return self.prompt_ids.count(b",") + 1 if self.prompt_ids else 0

    def prompt_token_ids(self) -> list[int]:
        """The prompt as the engine read it."""
        return [int(item) for item in (self.prompt_ids or b"").split(b",") if item.strip()]

    def feed(self, events: bytes) -> bytes:
        """Take `events`; returns them as the client should have them, up to a fault."""
        mark = self._mark
        at = events.find(mark)
        # One event, one piece of text, not the first and not the last: nearly all of them.
        if (
            at < 0
            or self.head is None
            or self.blocked is not None
            or events.find(b"\n\n") + 2 != len(events)
            or events.find(self._finish_mark) >= 0
        ):
            return self._read_all(events)
        start = at + len(mark)
        end = events.find(b'"', start)
        if end == start or events[end - 1] == _BACKSLASH:  # beside no text stand other things
            return self._read_all(events)
        said = events[start:end]
        at = events.find(self._ids_mark, end)
        if at < 0:
            if self._num_held:
                self.add(b"", said)
            else:  # as `add`, which this is too often called for
                self._said += said
                self.num_tokens += 1
                self.num_pending = 0
            return events
        start = at + len(self._ids_mark)
        end = events.find(b"]", start)
        self.add(events[start:end], said)
        if self.hides_ids:
            return events[:at] + _HIDDEN + events[end + 1 :]
        return events

    def add(self, ids: bytes, said: bytes, num_out: int | None = None) -> None:
        """Tokens (comma-separated, if told) and their text (as inside of a JSON string).

        `num_out`: characters that the engine let out, if they were not all for the client.
        """
        num = 1  # an engine that tells no ids sends an event a token
        if ids:
            num += ids.count(b",")
            self._ids += ids + b","
        self.num_tokens += num
        if said:
            self._said += said
            self.num_pending = 0
        else:
            self.num_pending += num
        if self._num_held:
            self._num_out += len(_unquoted(said)) if num_out is None else num_out
            if said or num_out:
                self._steps.append((self.num_tokens, self._num_out))

    def roll_back(self) -> Again:
        """Forget the tokens whose text is not all out: the next engine makes them anew."""
        self._num_sent = max(self._num_sent, self.num_tokens)
        self.fault = None
        kept, text = self.num_tokens - self.num_pending, ""
        if self._num_held:
            # Where an engine let text out, it held back just that much: so the length of all is known.
            text = self.text
            while self._steps and self._steps[-1][1] + self._num_held > len(text):
                self._steps.pop()
            kept, self._num_out = self._steps[-1] if self._steps else (0, -self._num_held)
            self._num_out += self._num_held
            text = text[self._num_out :]
        if self._ids:
            ids = self._ids.split(b",")[:kept]
            self._ids = bytearray(b"".join([item + b"," for item in ids]))
        self.num_tokens, self.num_pending = kept, 0
        return Again(self._num_sent - kept, text)

    def _read_all(self, events: bytes) -> bytes:
        """The long way: event by event, line by line."""
        passed: list[bytes] = []
        for event in events.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
            was_read = self._read(event) if event else True
            if was_read and not self._only_ids:
                passed.append(event)
                continue
            events, self._only_ids = b"", False  # what was not passed over is put together anew
            if not was_read:
                break
        if not events:
            events = b"".join([one + b"\n\n" for one in passed if one])
        return _ANY_IDS.sub(_hidden, events) if self.hides_ids else events

    def _read(self, event: bytes) -> bool:
        """Whether `event` is one that the client should have."""
        for line in event.split(b"\n"):
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.finished = self.done = True
                elif not self._read_chunk(data):
                    return False
            elif not line.startswith((b":", b"event:", b"id:", b"retry:")):
                self.fault = f"it sent {line[:40]!r} in a stream of events"
                return False
        return True

    def _read_chunk(self, data: bytes) -> bool:
        ids, prompt_ids = b"", None
        for found in _ANY_IDS.finditer(data):
            if found[1]:
                prompt_ids = found[2]
            else:
                ids = found[2].replace(b" ", b"")
        try:
            chunk = read_json(_ANY_IDS.sub(_hidden, data))
        except (ValueError, RecursionError) as error:
            self.fault = f"it sent an event that is no JSON: {error}"
            return False
        if not isinstance(chunk, dict) or "error" in chunk:
            if _is_the_clients(chunk):
                self.finished = True
                return True
            self.fault = _told_error(chunk)
            return False
        if prompt_ids is not None:
            self.prompt_ids = prompt_ids
        if self.head is None:
            self.head = {name: chunk[name] for name in _CHUNK_NAMES if name in chunk}
            if b'": ' in data and b'":"' not in data:
                self._expect_spaces()
        self.usage_sent = self.usage_sent or bool(chunk.get("usage") and not chunk.get("choices"))
        choices = chunk.get("choices") or []
        if not isinstance(choices, list):
            self.fault = "it sent choices that are none"
            return False
        return all(self._read_choice(choice, ids) for choice in choices)

    def note_parts(self, delta: dict[str, Any], text: str) -> bool:
        """Whether `delta` has more than text, in the middle of which no other engine can go on."""
        if delta.get("tool_calls"):
            self.blocked = "it is in the middle of tool calls"
            return True
        if delta.get("reasoning") or delta.get("reasoning_content"):
            self.blocked = "it is in the middle of reasoning"
            return True
        if text and self.blocked and "reasoning" in self.blocked:
            self.blocked = None
            self.reasoned = True
        return False

    def _expect_spaces(self) -> None:
        """Engines write JSON either way, but always in the same."""
        marks = (self._mark, self._ids_mark, self._finish_mark)
        spaced = (mark.replace(b":", b": ") for mark in marks)
        self._mark, self._ids_mark, self._finish_mark = spaced

    def _read_choice(self, choice: Any, ids: bytes) -> bool:
        delta = choice.get("delta") or {} if isinstance(choice, dict) else None
        if not isinstance(delta, dict):
            self.fault = "it sent a choice that is none"
            return False
        text = choice.get("text") or delta.get("content") or ""
        if not isinstance(text, str):
            self.blocked, text = "it says something else than text", ""
        if choice.get("finish_reason") == _ABORT:
            self.fault = "it gave the request up"
            return False
        self.note_parts(delta, text)
        if choice.get("index"):
            self.blocked = "it has several choices"
        reason = choice.get("finish_reason")
        self.finished = self.finished or reason is not None
        # vLLM's parsers swallow tokens, and it sends a chunk for them only because we asked for ids.
        self._only_ids = bool(self.hides_ids and ids and choice.get("delta") == {} and not reason)
        if ids or text or not (delta.get("role") or choice.get("finish_reason")):
            self.add(ids, quoted(text))
        return True


def _unquoted(said: bytes) -> str:
    """The text inside of a JSON string."""
    if b"\\" in said:
        return str(read_json(b'"' + said + b'"'))
    return said.decode(errors="replace")


def _hidden(found: re.Match[bytes]) -> bytes:
    return b'"%btoken_ids":null' % (found[1] or b"")


def _is_the_clients(chunk: Any) -> bool:
    """Whether an error event is about the request, which no other engine would like better."""
    error = chunk.get("error") if isinstance(chunk, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return isinstance(code, int) and 400 <= code < 500


def _told_error(chunk: Any) -> str:
    error = chunk.get("error") if isinstance(chunk, dict) else chunk
    message = error.get("message") if isinstance(error, dict) else error
    return f"it sent an error: {str(message)[:200]}"
