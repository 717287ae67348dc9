"""Relay: a streamed answer on its way to a client, event by event, with what is to be learned of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from time import monotonic

from gateway.record import GAP_BUCKETS_S, Gaps, Record
from gateway.reply import Renamer
from gateway.sse import EventAligner
from gateway.transcript import Transcript
from gateway.usage import USAGE_KEY, Usage, find_usage

# How HTTP writes the size of a chunk, for those sizes that events have.
_SIZES = {b"%x\r\n" % size: size for size in range(0x10, 0x1000)}


class Relay:
    """Passes whole events on to `write`; `on_fault` is called when the engine tells of its own failure.

    `splice` puts what another engine says into the form of the stream. `write_chunks`, if it is
    there, takes a body with its HTTP chunks around it.
    """

    __slots__ = (
        *("_aligner", "_on_fault", "_gaps", "_is_plain", "_record", "_rename", "last_at"),
        *("splice", "transcript", "write", "write_chunks", "wrote"),
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
        self.last_at = monotonic()
        self.wrote = False
        self.write_chunks: Callable[[bytes], None] | None = None
        self._is_plain = False  # what comes next may go on as it comes
        self._aligner = EventAligner()
        self._record = record
        self._rename = rename
        self.write = write
        self._on_fault = on_fault

    def feed(self, data: bytes) -> None:
        """One read of the stream: whole events go on, and cost little when they came whole."""
        self._is_plain = False
        events = self._aligner.feed(data)
        if not events:
            return
        self._pass_on(events)
        self._is_plain = self.write_chunks is not None and self._may_be_plain()

    def feed_chunks(self, data: bytes) -> bytes:
        """Pass on HTTP chunks as they came, as long as each is one event with only more text in it.

        Returns the rest: the engine's connection reads it, and what is in it comes to `feed`. Nearly
        all that goes through a gateway goes through here.
        """
        told, write, gaps = self.transcript, self.write_chunks, self._gaps
        while self._is_plain and told is not None and write is not None:
            start = 5
            size = _SIZES.get(data[:start])
            if size is None:
                start = 4
                size = _SIZES.get(data[:start])
            if size is None or (end := start + size) + 2 > len(data):
                break
            rest = b""
            if end + 2 < len(data):
                data, rest = data[: end + 2], data[end + 2 :]
            event = told.note(data, start)
            if event is None:
                return data + rest
            now = monotonic()
            gap, self.last_at = now - self.last_at, now
            gaps.counts[bisect_left(GAP_BUCKETS_S, gap)] += 1
            gaps.sum_s += gap
            if event is not data:
                event = b"%x\r\n%b" % (len(event) - start - 2, event[start:])
            write(event)
            if not rest:
                return rest
            data = rest
        return data

    def end(self) -> None:
        """The engine has said all: what is left of it goes on too."""
        tail, self._aligner = self._aligner.tail, EventAligner()
        if tail:
            self._pass_on(tail)

    @property
    def is_whole(self) -> bool:
        """The client has all of an answer, as far as can be told."""
        told = self.transcript
        return self.wrote and (told is None or told.finished or not told.has_tokens)

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
        now = monotonic()
        if self.wrote:
            self._gaps.counts[bisect_left(GAP_BUCKETS_S, now - self.last_at)] += 1
            self._gaps.sum_s += now - self.last_at
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

    def _may_be_plain(self) -> bool:
        """Whether what comes next may go on as it comes, if it looks like all the rest.

        Not from an engine that tells the usage with every event: the last one counts.
        """
        told = self.transcript
        return (
            self.wrote
            and told is not None
            and self.splice is None
            and self._rename is None
            and self._record.usage is None
            and not self._aligner.tail
        )
