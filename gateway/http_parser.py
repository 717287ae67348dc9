"""Strict HTTP/1.1 requests from bytes, however they are cut. No I/O.

llhttp (through httptools) parses, and refuses bare LF, obs-fold, space before a colon, bad or several
Content-Length, Content-Length beside Transfer-Encoding, bad chunk sizes and control characters. What
it leaves open is refused here: codings other than `chunked`, versions other than 1.0 and 1.1, no or
several or bad Host, fragments, and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from urllib.parse import unquote, urlsplit

import httptools

from gateway.config import Limits
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    HeadTooLarge,
    Malformed,
    NotExpected,
    TargetTooLong,
)
from gateway.head_cache import Head, HeadCache, KnownHead

# A second one of these makes a message ambiguous; of the others the first counts.
_SINGLE = frozenset(("host", "content-length", "transfer-encoding", "expect"))
_METHODS = frozenset(
    (b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"PATCH", b"DELETE", b"TRACE", b"QUERY")
)
# A name, an address, or nothing, and perhaps a port: no user, no list, no path.
_HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+;=%-]*(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?", re.ASCII)

_SMALL_PART_BYTES = 1024  # many of these by themselves would take many times their bytes
_JOINED_BYTES = 64 * 1024
_MAX_BYTES_PER_BODY_BYTE = 16  # a chunk of one byte takes six


class Stage(IntEnum):
    """Where a parser stands in the stream of requests."""

    IDLE = 0
    HEAD = 1
    BODY = 2


@dataclass(slots=True)
class Request:
    """A whole request."""

    head: Head
    body: bytes = b""


@dataclass(slots=True)
class _Draft:
    """What has arrived of a request."""

    target: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    num_headers: int = 0
    num_bytes: int = 0
    head_bytes: int = 0
    num_body_bytes: int = 0
    body: list[bytes | bytearray] = field(default_factory=list)


class RequestParser:
    """Turns a connection's bytes into requests, in order.

    `on_request` gets each one when all of it is there; `on_continue` is called after a head with
    `expect: 100-continue`. After an error, and after a request that ends the connection, what
    follows is ignored.
    """

    def __init__(
        self,
        limits: Limits,
        heads: HeadCache,
        on_request: Callable[[Request], None],
        on_continue: Callable[[], None],
    ) -> None:
        self.stage = Stage.IDLE
        self.finished = False
        self._limits = limits
        self._on_request = on_request
        self._on_continue = on_continue
        self._llhttp = httptools.HttpRequestParser(self)
        self._draft = _Draft()
        self._heads = heads
        self._head_data = b""  # of the request that began with this read
        self._head: Head | None = None
        self._known: KnownHead | None = None  # the connection's last head, if it was known
        self._error: GatewayError | None = None
        self._upgrading = False

    @property
    def num_body_bytes(self) -> int:
        """Bytes of the present request's body that have arrived."""
        return self._draft.num_body_bytes

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            BadRequest: they are not HTTP/1.1 within the limits. Nothing can be read any more.
        """
        if self.stage is Stage.IDLE and self._took_known(data):
            return
        began_in = self._draft
        rest = data
        while rest and not self.finished:
            try:
                self._llhttp.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
                self._stay_with_http()
                continue
            except httptools.HttpParserError as error:
                if self.finished:  # pipelined behind `connection: close`
                    return
                self.finished = True
                raise (self._error or Malformed(f"not valid HTTP/1.1: {error}")) from None
            break
        if self.stage is not Stage.IDLE and began_in is self._draft:
            self._check_unfinished(len(data))

    def close(self) -> None:
        """Read nothing more. Lets go of llhttp, which refers back to here."""
        self.finished = True
        del self._llhttp

    def on_message_begin(self) -> None:
        """Called by llhttp, as all that follow."""
        if not self._upgrading:
            self.stage = Stage.HEAD

    def on_url(self, url: bytes) -> None:  # noqa: D102
        if self._upgrading:
            return
        draft = self._draft
        draft.target += url
        draft.head_bytes += len(url)
        if draft.head_bytes > self._limits.max_target_bytes:
            self._refuse(_target_too_long(self._limits))

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: D102
        if self._upgrading:
            return
        draft = self._draft
        draft.num_headers += 1
        draft.head_bytes += len(name) + len(value) + 4
        limits = self._limits
        if draft.head_bytes > limits.max_head_bytes or draft.num_headers > limits.max_headers:
            self._refuse(_head_too_large(limits))
        if self._head is not None:
            return  # a trailer
        key = name.decode("latin-1").lower()
        if key not in draft.headers:
            draft.headers[key] = value.decode("latin-1").rstrip(" \t")
        elif key in _SINGLE:
            self._refuse(Malformed(f"several {key} headers"))

    def on_headers_complete(self) -> None:  # noqa: D102
        if self._upgrading:
            self._upgrading = False
            return
        self.stage = Stage.BODY
        try:
            self._head = head = self._checked_head()
        except GatewayError as error:
            self._refuse(error)
        if self._head_data:
            self._heads.add(self._head_data, head)
            self._head_data = b""

    def on_body(self, data: bytes) -> None:  # noqa: D102
        draft = self._draft
        body = draft.body
        if len(data) >= _SMALL_PART_BYTES or not body:
            body.append(data)
        elif isinstance(last := body[-1], bytearray) and len(last) < _JOINED_BYTES:
            last += data
        else:
            body.append(bytearray(data))
        draft.num_body_bytes += len(data)
        if draft.num_body_bytes > self._limits.max_body_bytes:
            self._refuse(_body_too_large(self._limits))

    def on_message_complete(self) -> None:  # noqa: D102
        head = self._head
        if head is None or self._upgrading:
            return
        body = self._draft.body
        self._head = None
        self._draft = _Draft()
        self.stage = Stage.IDLE
        self.finished = not head.keep_alive
        self._on_request(Request(head, bytes(body[0]) if len(body) == 1 else b"".join(body)))

    def _took_known(self, data: bytes) -> bool:
        """Whether `data` was one whole request with a head that is known."""
        if self.finished:
            return False
        read = self._known.read(data) if self._known is not None else None
        if read is None:
            end = data.find(b"\r\n\r\n") + 4
            if end < 4 or end > self._limits.max_head_bytes:
                self._head_data = b""
                return False
            head_data = data[:end]
            known = self._heads.find(head_data)
            read = known.read(data) if known is not None else None
            if read is None:
                self._head_data = head_data
                return False
            self._known = known
        head, end, length = read
        if len(data) != end + length or length > self._limits.max_body_bytes:
            self._head_data = b""
            return False
        self.finished = not head.keep_alive
        self._on_request(Request(head, data[end:]))
        return True

    def _checked_head(self) -> Head:
        llhttp, draft = self._llhttp, self._draft
        headers, version, method = draft.headers, llhttp.get_http_version(), llhttp.get_method()
        _check_head(method, version, headers)
        length = int(headers.get("content-length", "0"))
        if length > self._limits.max_body_bytes:
            raise _body_too_large(self._limits)
        path, query = _path_and_query(draft.target)
        if "upgrade" in headers:
            self._upgrading = llhttp.should_upgrade()
        if "expect" in headers and (length or "transfer-encoding" in headers) and version != "1.0":
            self._on_continue()
        told = {name: value for name, value in headers.items() if name != "content-length"}
        return Head(method, path, told, llhttp.should_keep_alive(), version, query)

    def _stay_with_http(self) -> None:
        """Read as a body what llhttp takes for another protocol, as we speak no other.

        Java's HttpClient, for one, offers h2c with its first request.
        """
        headers = self._draft.headers
        head = b"POST / HTTP/1.1\r\n"
        for name in ("content-length", "transfer-encoding"):
            if name in headers:
                head += f"{name}: {headers[name]}\r\n".encode("latin-1")
        if self._head is not None and not self._head.keep_alive:
            head += b"connection: close\r\n"  # what follows is not read
        self._llhttp = httptools.HttpRequestParser(self)
        self._llhttp.feed_data(head + b"\r\n")

    def _check_unfinished(self, num_bytes: int) -> None:
        """Bound what llhttp keeps or skips: one endless header, chunk extension or trailer."""
        draft, limits = self._draft, self._limits
        draft.num_bytes += num_bytes
        allowed = limits.max_head_bytes
        if self.stage is Stage.BODY:
            allowed += limits.max_head_bytes + _MAX_BYTES_PER_BODY_BYTE * draft.num_body_bytes
        if draft.num_bytes > allowed:
            self.finished = True
            raise _head_too_large(limits)

    def _refuse(self, error: GatewayError) -> None:
        self._error = error
        raise error


def _check_head(method: bytes, version: str, headers: dict[str, str]) -> None:
    if method not in _METHODS:
        raise Malformed(f"{method.decode()} is no method of this server")
    if version == "1.1":
        if "host" not in headers:
            raise Malformed("HTTP/1.1 asks for a host header")
        if not _HOST.fullmatch(headers["host"]):
            raise Malformed("the host header names no host")
    elif version != "1.0":
        raise Malformed(f"HTTP/{version} is not spoken here, only 1.1 and 1.0")
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if version == "1.0":
            raise Malformed("HTTP/1.0 has no transfer-encoding")
        if coding.strip().lower() != "chunked":
            raise Malformed("the only transfer-encoding is `chunked`")
    expected = headers.get("expect")
    if expected is not None and expected.strip().lower() != "100-continue":
        raise NotExpected("the only expectation that is met is `100-continue`")


@lru_cache(maxsize=256)
def _path_and_query(target: bytes) -> tuple[str, str]:
    """The decoded path, and the query as it came, of a target in origin, absolute or asterisk form."""
    text = target.decode("ascii", "replace")
    if "#" in text:
        raise Malformed("a request target has no fragment")
    if text.lower().startswith(("http://", "https://")):
        parts = urlsplit(text)
        if not _HOST.fullmatch(parts.netloc) or not parts.hostname:
            raise Malformed("the request target's URL names no host, or a user")
        text = f"{parts.path or '/'}?{parts.query}"
    elif not text.startswith("/") and text != "*":
        raise Malformed("the request target is neither a path nor an http URL")
    path, _, query = text.partition("?")
    return unquote(path), query


def _target_too_long(limits: Limits) -> TargetTooLong:
    return TargetTooLong(f"the request target is longer than {limits.max_target_bytes} bytes")


def _head_too_large(limits: Limits) -> HeadTooLarge:
    return HeadTooLarge(
        f"more than {limits.max_headers} headers, or more than {limits.max_head_bytes} bytes of them"
    )


def _body_too_large(limits: Limits) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limits.max_body_bytes} bytes")
