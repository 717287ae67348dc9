"""Answer: the head of what an engine says, and how its bytes arrive."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from gateway.errors import EngineBroke


@dataclass(slots=True)
class Answer:
    """Status and headers. Header names are lower-case."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    content_type: bytes = b""
    is_json: bool = False
    lines: bytes | None = None  # those headers that go to a client, once they were looked for

    @property
    def is_event_stream(self) -> bool:
        """Server-sent events follow."""
        return self.content_type.startswith(b"text/event-stream")


class Listener(Protocol):
    """Who asked an engine. Called in this order: `answered`, or `began`, `received` ..., `ended`.

    `stale` or `broke` may come in the place of any of them, and end it.
    """

    def answered(self, answer: Answer, body: bytes) -> None:
        """All of a JSON answer."""

    def began(self, answer: Answer) -> None:
        """Any other answer: its first bytes, or its end, come next."""

    def received(self, data: bytes) -> None:
        """Bytes of the body."""

    def ended(self) -> None:
        """The body is complete."""

    def stale(self) -> None:
        """The engine had closed the idle connection: nothing of an answer came, so ask again."""

    def broke(self, error: EngineBroke) -> None:
        """The connection broke before the end."""
