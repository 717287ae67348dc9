"""A stream's chunks as protobuf messages, made cheaply: most differ from the last in a text only.

Engines write every chunk of a stream in the same way. Of the first one the bytes around its text are
remembered, and an event between the same bytes is the same message with another text; any other event
takes the long way through its JSON.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from gateway.grpc_edge import chunk_of
from gateway.grpc_messages import fill
from gateway.proto import inference_pb2 as pb

_TEXT = re.compile(rb'"(?:content|text)":\s*"((?:[^"\\]|\\.)+)"')
_string = msgspec.json.Decoder(str)


class ChunkMessages:
    """Turns one stream's events into serialized messages of `form`."""

    __slots__ = ("_form", "_head", "_message", "_said", "_tail")

    def __init__(self, form: Callable[[], Any]) -> None:
        self._form = form
        self._message: Any = None
        self._said: Callable[[str], None] | None = None
        self._head = self._tail = b""

    def message(self, data: bytes) -> bytes:
        """The message that says what the event's `data` says.

        Raises:
            EngineRefused: it is the engine's error event.
            EngineBroke: it is no JSON object.
        """
        head, tail = self._head, self._tail
        end = len(data) - len(tail)
        if self._said and end > len(head) and data.startswith(head) and data.endswith(tail):
            try:
                self._said(_string.decode(b'"%b"' % data[len(head) : end]))
            except msgspec.DecodeError:
                pass  # more than a text stands there
            else:
                result: bytes = self._message.SerializeToString()
                return result
        return self._the_long_way(data)

    def _the_long_way(self, data: bytes) -> bytes:
        chunk = chunk_of(data)
        message = self._form()
        fill(message, chunk)
        found = list(_TEXT.finditer(data))
        # Quotes inside of strings are escaped: a key that stands there once is the text's.
        if len(found) == 1 and (said := _setter(message)) is not None:
            start, end = found[0].span(1)
            self._head, self._tail = data[:start], data[end:]
            self._message, self._said = message, said
        result: bytes = message.SerializeToString()
        return result


def _setter(message: Any) -> Callable[[str], None] | None:
    """Sets the text of a chunk with one choice that has one."""
    if len(message.choices) != 1:
        return None
    choice = message.choices[0]
    if isinstance(message, pb.ChatCompletionChunk):
        where, name = choice.delta, "content"
    else:
        where, name = choice, "text"
    if not getattr(where, name):
        return None

    def said(text: str) -> None:
        setattr(where, name, text)

    return said
