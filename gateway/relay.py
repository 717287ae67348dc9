"""Relay: a streamed answer on its way to a client, event by event, with what is to be learned of it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from gateway.record import GAP_BUCKETS_S, Gaps, Record
from gateway.reply import Renamer
from gateway.sse import EventAligner
from gateway.transcript import Transcript
from gateway.usage import USAGE_KEY, Usage, find_usage


class Relay:
    """Passes whole events on to `write`; `on_fault` is called when the engine tells of its own failure.

    `splice` puts what another engine says into the form of the stream.
    """

    __slots__ = (
        *("_aligner", "_on_fault", "_gaps", "_record", "_rename", "last_at", "splice"),
        *("transcript", "write", "wrote"),
    )

    def __init__(
        self,
        record: Record,
        write: Callable[[bytes], None],
        *,
        transcript: Transcript | None,
        rename: Renamer | None,
        on_fault: Callable[[], None],
    ) -> None:
        self.transcript = transcript
        self.splice: Callable[[bytes], bytes] | None = None
        self._gaps = record.gaps = Gaps()
        self.last_at = time.monotonic()
        self.wrote = False
        self._aligner = EventAligner()
        self._record = record
        self._rename = rename
        self.write = write
        self._on_fault = on_fault

    def feed(self, data: bytes) -> None:
        """One read of the stream: whole events go on, and cost little when they came whole."""
        if self._aligner.tail or not data.endswith(b"\n\n"):
            data = self._aligner.feed(data)
            if not data:
                return
        self._pass_on(data)

    def end(self) -> None:
        """The engine has said all: what is left of it goes on too."""
        tail, self._aligner = self._aligner.tail, EventAligner()
        if tail:
            self._pass_on(tail)

    @property
    def is_whole(self) -> bool:
        """The client has all of an answer, as far as can be told."""
        told = self.transcript
        return self.wrote and (told is None or told.finished or not told.num_tokens)

    def count(self) -> None:
        """Where the engine told no usage, note what the events tell of it."""
        record, transcript = self._record, self.transcript
        if transcript is None or record.usage is not None:
            return
        record.answer_chunks = transcript.num_tokens
        if transcript.prompt_ids is not None:
            record.usage = Usage(transcript.num_prompt_tokens, transcript.num_tokens)

    def drop_tail(self) -> None:
        """Forget half an event of an engine that broke off."""
        self._aligner = EventAligner()

    def _pass_on(self, events: bytes) -> None:
        now = time.monotonic()
        if self.wrote:
            gap = now - self.last_at
            self._gaps.counts[bisect_left(GAP_BUCKETS_S, gap)] += 1
            self._gaps.sum_s += gap
        self.last_at = now
        transcript = self.transcript
        if transcript is not None:
            events = (self.splice or transcript.feed)(events)
        else:
            self._record.answer_chunks += events.count(b"data:")
        if self._rename is not None:
            events = self._rename(events)
        if events:
            if USAGE_KEY in events:
                self._record.usage = find_usage(events) or self._record.usage
            self.write(events)
            self.wrote = True
        if transcript is not None and transcript.fault is not None:
            self._on_fault()
