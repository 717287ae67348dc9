"""HTTP/1.1 responses as bytes. No I/O."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from gateway.errors import GatewayError

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
NO_BODY = (204, 304)  # statuses of answers without one, so without framing
JSON_TYPE = b"content-type: application/json; charset=utf-8\r\n"
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class _Date:
    """The `date` header, made once a second."""

    def __init__(self) -> None:
        self._second = -1
        self._line = b""

    def line(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = f"date: {formatdate(second, usegmt=True)}\r\n".encode()
        return self._line


_date_line = _Date().line


def head(status: int, headers: bytes, *, keep_alive: bool, length: int | None = None) -> bytes:
    """Status line and headers. `headers` are whole lines; without `length` the body is chunked."""
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    if status in NO_BODY:
        framing = b""
    elif length is None:
        framing = b"transfer-encoding: chunked\r\n"
    else:
        framing = b"content-length: %d\r\n" % length
    ending = b"\r\n" if keep_alive else b"connection: close\r\n\r\n"
    return b"".join((line, _date_line(), headers, framing, ending))


def head_until_close(status: int, headers: bytes) -> bytes:
    """For HTTP/1.0, which has no chunks: the body ends with the connection."""
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return b"".join((line, _date_line(), headers, b"connection: close\r\n\r\n"))


def json_body(value: Any) -> bytes:
    """A JSON document."""
    return json.dumps(value).encode()


def error_headers(error: GatewayError, request_id: str) -> bytes:
    """The headers of an error body."""
    lines = JSON_TYPE + b"x-request-id: %b\r\n" % request_id.encode()
    if error.retry_after:
        lines += b"retry-after: %b\r\n" % error.retry_after.encode()
    for name, value in error.more_headers.items():
        lines += f"{name}: {value}\r\n".encode()
    return lines
