"""Opening: how an answer begins: its status and headers, once, and comments until a stream has more."""

from __future__ import annotations

import asyncio

from gateway.answer import Answer
from gateway.plant import Client, Plant
from gateway.record import Record
from gateway.reply import header_lines, lines_of_ours

_EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-store\r\n"
_HEARTBEAT = b": the request waits\n\n"


class Opening:
    """Of one call's answer. `is_done`: the client has a status."""

    __slots__ = ("_client", "_heartbeat", "_plant", "_record", "answer", "is_done")

    def __init__(self, plant: Plant, client: Client, record: Record) -> None:
        self.answer = Answer()  # whose head the client gets
        self.is_done = False
        self._plant, self._client, self._record = plant, client, record
        self._heartbeat: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """The client gets the head of `answer`."""
        answer, record = self.answer, self._record
        self.is_done = True
        record.status = answer.status
        headers = header_lines(answer, record)
        self._client.start(answer.status, headers, is_event_stream=answer.is_event_stream)

    def start_heartbeat(self) -> None:
        """From now on tell a client of a stream that nothing has come, so that no proxy hangs up."""
        if self._heartbeat is None:
            beat_s = self._plant.admission.limits.heartbeat_s
            self._heartbeat = self._plant.loop.call_later(beat_s, self._beat, beat_s)

    def stop_heartbeat(self) -> None:
        """Something has come."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None

    def _beat(self, beat_s: float) -> None:
        if not self.is_done:
            self.is_done, self._record.status = True, 200
            headers = _EVENT_STREAM + lines_of_ours(self._record)
            self._client.start(200, headers, is_event_stream=True)
        self._client.write(_HEARTBEAT)
        self._heartbeat = self._plant.loop.call_later(beat_s, self._beat, beat_s)
