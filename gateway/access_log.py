"""The access log: one line of JSON per request, written together once per turn of the event loop."""

from __future__ import annotations

import asyncio
import logging
import random
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as quoted

from gateway.record import Record

_access = logging.getLogger("gateway.access")


class AccessLog:
    """Writes `sample` (0 to 1) of the requests, and all that failed."""

    def __init__(self, sample: float) -> None:
        self._sample = sample
        self._records: list[Record] = []

    def add(self, record: Record) -> None:
        """Write `record` soon. Must be called in an event loop."""
        if record.status < 400 and self._sample < 1 and random.random() >= self._sample:  # noqa: S311
            return
        self._records.append(record)
        if len(self._records) == 1:
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Write what is still to be written."""
        if not self._records:
            return
        if _access.isEnabledFor(logging.INFO):
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            _access.info("\n".join([_line(record, now) for record in self._records]))
        self._records.clear()


def _line(record: Record, now: str) -> str:
    usage = record.usage
    ttft = "null" if record.ttft_s is None else f"{record.ttft_s:.4f}"
    return (
        f'{{"time": "{now}", "request_id": "{record.request_id}", "api": "{record.api}",'
        f' "path": {quoted(record.path)}, "tenant": {quoted(record.tenant)}, "model": {quoted(record.model)},'
        f' "variant": {quoted(record.variant)}, "endpoint": {quoted(record.endpoint)},'
        f' "status": {record.status}, "duration_s": {record.duration_s:.4f},'
        f' "queued_s": {record.queued_s:.4f}, "ttft_s": {ttft},'
        f' "prompt_tokens": {usage.prompt_tokens if usage else "null"},'
        f' "completion_tokens": {usage.completion_tokens if usage else "null"},'
        f' "attempts": {record.attempts}, "migrations": {record.migrations},'
        f' "error": {quoted(record.error) if record.error else "null"}}}'
    )
