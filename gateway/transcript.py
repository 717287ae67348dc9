"""Transcript: what a stream of chat or completion chunks has said, so that another engine can go on.

vLLM tells the ids of the tokens when asked (`return_token_ids`): they make a continuation exact. They
are taken out again on the way to a client that did not ask, byte for byte as if nobody had.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gateway.lenient_json import quoted, read_json

_ANY_IDS = re.compile(rb'("(prompt_)?token_ids": ?)\[([\d, ]*)\]')
_BACKSLASH = 0x5C
_UNUSUAL = b"\n"  # in front of an event that is kept whole: it may say more than text
_ABORT = "abort"  # vLLM's own reason for an end that nobody asked for
_CHUNK_NAMES = ("id", "object", "created", "model")


@dataclass(frozen=True, slots=True)
class Again:
    """What an engine that goes on makes a second time: so many tokens, and this of their text."""

    num_tokens: int = 0
    text: str = ""


class Transcript:
    """Fed with whole events. `fault` is set once an event tells of an engine that failed.

    Of events with nothing but more text is kept what differs, up to `max_unread` of them, and read
    only when somebody wants to know: most streams end well, and nobody does.
    """

    __slots__ = (
        *("_after", "_after_in_chunk", "_before", "_before_ids", "_blocked", "_going_on", "_ids"),
        *("_ids_mark", "_mark", "_max_unread", "_num_held", "_num_out", "_num_pending"),
        *("_num_sent", "_num_tokens", "_only_ids", "_reasoned", "_said", "_skims", "_steps"),
        *("_unread", "done", "fault", "finished", "head", "hides_ids", "prompt_ids"),
        *("usage_sent",),
    )

    def __init__(
        self, *, is_chat: bool, hides_ids: bool, num_held: int = 0, max_unread: int = 0
    ) -> None:
        """`num_held`: characters that the engine holds back, as they may begin a stop string."""
        self._mark = b'"content":"' if is_chat else b'"text":"'
        self._ids_mark, self._going_on = b'"token_ids":[', b'"finish_reason":null'
        # What stands around the text, and the ids, of each event; none is known yet.
        self._before, self._before_ids = b"\n", b""
        self._after = self._after_in_chunk = b""
        self._unread: list[bytes] = []
        self._max_unread = max_unread
        self._ids = bytearray()
        self._said = bytearray()
        self._num_held = num_held
        self._num_out = 0  # characters that engines have let out, where some are held back
        self._steps: list[tuple[int, int]] = []  # then: after so many tokens, so many characters
        self._only_ids = False  # the event has nothing else to tell
        self._skims = False  # see what it means for now; its text is read in its turn
        self._num_sent = 0  # tokens that the client has seen chunks of
        self.hides_ids = hides_ids
        self.head: dict[str, Any] | None = None
        self.prompt_ids: bytes | None = None
        self._num_tokens = 0
        self._num_pending = 0  # tokens whose text is not out yet: half of a character
        self.finished = self.usage_sent = self.done = self._reasoned = False
        self._blocked: str | None = None
        self.fault: str | None = None

    @property
    def text(self) -> str:
        """All that the client has read."""
        self._read_up()
        return _unquoted(bytes(self._said))

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        self._read_up()
        return [int(item) for item in self._ids.split(b",") if item]

    @property
    def num_tokens(self) -> int:
        """How many; where the engine tells no ids, as many as events."""
        self._read_up()
        return self._num_tokens

    @property
    def has_tokens(self) -> bool:
        """Whether there are any."""
        return bool(self._unread or self._num_tokens)

    @property
    def is_exact(self) -> bool:
        """The engine told every token, those of the prompt too."""
        self._read_up()
        return self.prompt_ids is not None and self._ids.count(b",") == self._num_tokens

    @property
    def reasoned(self) -> bool:
        """It reasoned before it said its text."""
        self._read_up()
        return self._reasoned

    @property
    def blocked(self) -> str | None:
        """Why no other engine can go on from here, if so."""
        self._read_up()
        return self._blocked

    @blocked.setter
    def blocked(self, reason: str | None) -> None:
        self._blocked = reason

    @property
    def num_prompt_tokens(self) -> int:
        """0 if the engine did not tell."""
        return self.prompt_ids.count(b",") + 1 if self.prompt_ids else 0

    def prompt_token_ids(self) -> list[int]:
        """The prompt as the engine read it."""
        return [int(item) for item in (self.prompt_ids or b"").split(b",") if item.strip()]

    def feed(self, events: bytes) -> bytes:
        """Take `events`; returns them as the client should have them, up to a fault."""
        if events.find(b"\n\n") + 2 == len(events) and self.head is not None:
            noted = self.note(events, 0)
            if noted is not None:
                return noted
            self._learn(events)
        return self._read_all(events)

    def note(self, data: bytes, start: int) -> bytes | None:
        """Keep the one event at `data[start:]`, if all that it has to tell is more text.

        Up to `start`, if that is not 0, is the size of an HTTP chunk, which ends the data. Returns
        `data` as the client should have it; None if the event is for `feed`. Engines write each
        event of a stream in the same way: what is the same in all tells that it is one.
        """
        after = self._after_in_chunk if start else self._after
        if not (data.endswith(after) and data.startswith(self._before, start)):
            return None
        start += len(self._before)
        piece = data[start : -len(after)]
        if piece.find(b"\n") >= 0:
            return None  # there are several
        at = 0
        if self._before_ids:
            at = piece.rfind(b"[") + 1
            if not piece.endswith(self._before_ids, 0, at):
                return None
        self._unread.append(piece)
        if len(self._unread) > self._max_unread:
            self._read_up()
        if at and self.hides_ids:
            return data[: start + at - 1] + b"null" + data[1 - len(after) :]
        return data

    def _learn(self, event: bytes) -> None:
        """See how the engine writes an event with more text, if this is one."""
        start = event.find(self._mark) + len(self._mark)
        end = event.find(b'"', start)
        going_on = event.find(self._going_on, end)
        if start < len(self._mark) or end <= start or event[end - 1] == _BACKSLASH or going_on < 0:
            return
        ids = event.find(self._ids_mark, end)
        if ids >= 0:
            ids += len(self._ids_mark)
            if ids < going_on or event.find(b"[", ids) >= 0:
                return
        self._read_up()  # what is kept was found by what was known before
        if ids >= 0:
            self._before_ids, self._after = event[end:ids], event[event.find(b"]", ids) :]
        else:
            self._before_ids, self._after = b"", event[end:]
        self._before, self._after_in_chunk = event[:start], self._after + b"\r\n"

    def add(self, ids: bytes, said: bytes, num_out: int | None = None) -> None:
        """Tokens (comma-separated, if told) and their text (as inside of a JSON string).

        `num_out`: characters that the engine let out, if they were not all for the client.
        """
        num = 1  # an engine that tells no ids sends an event a token
        if ids:
            num += ids.count(b",")
            self._ids += ids + b","
        self._num_tokens += num
        if said:
            self._said += said
            self._num_pending = 0
        else:
            self._num_pending += num
        if self._num_held:
            self._num_out += len(_unquoted(said)) if num_out is None else num_out
            if said or num_out:
                self._steps.append((self._num_tokens, self._num_out))

    def roll_back(self) -> Again:
        """Forget the tokens whose text is not all out: the next engine makes them anew."""
        self._read_up()
        self._num_sent = max(self._num_sent, self._num_tokens)
        self.fault = None
        kept, text = self._num_tokens - self._num_pending, ""
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
        self._num_tokens, self._num_pending = kept, 0
        return Again(self._num_sent - kept, text)

    def _read_up(self) -> None:
        """Read what was kept unread."""
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        fault = self.fault
        for piece in unread:
            if piece.startswith(_UNUSUAL):
                event = piece[len(_UNUSUAL) :]
            elif self._read_piece(piece):
                continue
            else:
                event = (self._before + piece + self._after).rstrip()
            if not self._read(event):
                self._blocked = f"what it said could not be read: {self.fault}"
        self.fault, self._only_ids = fault, False

    def _read_piece(self, piece: bytes) -> bool:
        """Read what differs in an event from others: a text, and ids. False if it is more."""
        said, ids = piece, b""
        if self._before_ids:
            said, _, ids = piece.rpartition(self._before_ids)
        if not said or b'"' in said or self._blocked:  # beside no text stand other things
            return False
        self.add(ids, said)
        return True

    def _read_all(self, events: bytes) -> bytes:
        """The long way: event by event, line by line."""
        passed: list[bytes] = []
        self._skims = bool(self._unread)
        lines = events
        if b"\r" in events:
            lines = events.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        for event in lines.split(b"\n\n"):
            was_read = self._read(event) if event else True
            if self._skims and was_read and b"data:" in event:
                self._unread.append(_UNUSUAL + event)
            if was_read and not self._only_ids:
                passed.append(event)
                continue
            events, self._only_ids = b"", False  # what was not passed over is put together anew
            if not was_read:
                break
        self._skims = False
        if len(self._unread) > self._max_unread:
            self._read_up()
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
        ids = b""
        if b"token_ids" in data:
            ids, data = self._taken_ids(data)
        try:
            chunk = read_json(data)
        except (ValueError, RecursionError) as error:
            self.fault = f"it sent an event that is no JSON: {error}"
            return False
        if chunk is None:  # llama.cpp's first, of several prompts: nothing to tell
            self._only_ids = True
            return True
        if not isinstance(chunk, dict) or "error" in chunk:
            if _is_the_clients(chunk):
                self.finished = True
                return True
            self.fault = _told_error(chunk)
            return False
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

    def _taken_ids(self, data: bytes) -> tuple[bytes, bytes]:
        """The ids of tokens in an event, and the event without them; those of a prompt are noted."""
        ids = b""
        for found in _ANY_IDS.finditer(data):
            if found[2]:
                self.prompt_ids = found[3]
            else:
                ids = found[3].replace(b" ", b"")
        return ids, _ANY_IDS.sub(_hidden, data)

    def note_parts(self, delta: dict[str, Any], text: str) -> bool:
        """Whether `delta` has more than text, in the middle of which no other engine can go on."""
        if delta.get("tool_calls"):
            self._blocked = "it is in the middle of tool calls"
            return True
        if delta.get("reasoning") or delta.get("reasoning_content"):
            self._blocked = self._blocked or "it is in the middle of reasoning"
            return True
        if text and self._blocked and "reasoning" in self._blocked:
            self._blocked = None
            self._reasoned = True
        return False

    def _expect_spaces(self) -> None:
        """Engines write JSON either way, but always in the same."""
        marks = (self._mark, self._ids_mark, self._going_on)
        spaced = (mark.replace(b":", b": ") for mark in marks)
        self._mark, self._ids_mark, self._going_on = spaced

    def _read_choice(self, choice: Any, ids: bytes) -> bool:
        delta = choice.get("delta") or {} if isinstance(choice, dict) else None
        if not isinstance(delta, dict):
            self.fault = "it sent a choice that is none"
            return False
        text = choice.get("text") or delta.get("content") or ""
        if not isinstance(text, str):
            self._blocked, text = "it says something else than text", ""
        if choice.get("finish_reason") == _ABORT:
            self.fault = "it gave the request up"
            return False
        reason = choice.get("finish_reason")
        self.finished = self.finished or reason is not None
        # vLLM's parsers swallow tokens, and it sends a chunk for them only because we asked for ids.
        self._only_ids = bool(self.hides_ids and ids and choice.get("delta") == {} and not reason)
        if self._skims:
            return True
        self.note_parts(delta, text)
        if choice.get("index"):
            self._blocked = "it has several choices"
        if ids or text or not (delta.get("role") or reason):
            self.add(ids, quoted(text))
        return True


def _unquoted(said: bytes) -> str:
    """The text inside of a JSON string."""
    if b"\\" in said:
        return str(read_json(b'"' + said + b'"'))
    return said.decode(errors="replace")


def _hidden(found: re.Match[bytes]) -> bytes:
    return found[1] + b"null"


def _is_the_clients(chunk: Any) -> bool:
    """Whether an error event is about the request, which no other engine would like better."""
    error = chunk.get("error") if isinstance(chunk, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return isinstance(code, int) and 400 <= code < 500


def _told_error(chunk: Any) -> str:
    error = chunk.get("error") if isinstance(chunk, dict) else chunk
    message = error.get("message") if isinstance(error, dict) else error
    return f"it sent an error: {str(message)[:200]}"
