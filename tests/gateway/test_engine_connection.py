"""What an engine may send, cut, broken off and damaged in every way, on a connection without a socket."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.answer import Answer
from gateway.answer_cache import AnswerCache
from gateway.engine_connection import EngineConnection
from gateway.errors import EngineBroke
from tests.gateway.http_stand import Pipe, bytewise

JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
WHOLE = JSON + b"content-length: 2\r\n\r\n{}"


class EnginePipe(Pipe):
    def writelines(self, parts: Iterable[bytes]) -> None:  # type: ignore[override]
        self.write(b"".join(parts))


@dataclass
class Told:
    """What came of an answer: `error` if it is not whole, None for `status` if it never began."""

    status: int | None
    body: bytes
    error: bool
    kept: bool  # the connection serves another request


@dataclass
class Heard:
    """A listener that keeps what it hears."""

    status: int | None = None
    body: bytes = b""
    error: EngineBroke | None = None

    def answered(self, answer: Answer, body: bytes) -> None:
        self.status, self.body = answer.status, body

    def began(self, answer: Answer) -> None:
        self.status = answer.status

    def received(self, data: bytes) -> None:
        self.body += data

    def ended(self) -> None:
        assert self.error is None

    def stale(self) -> None:
        raise AssertionError("it was never used before")

    def broke(self, error: EngineBroke) -> None:
        self.error = error


def asked(kept: list[EngineConnection]) -> tuple[EngineConnection, EnginePipe, Heard]:
    """A connection on which a request has gone out."""
    connection, pipe, heard = (
        EngineConnection("engine", kept.append, AnswerCache()),
        EnginePipe(),
        Heard(),
    )
    connection.connection_made(pipe)
    connection.ask(b"POST / HTTP/1.1\r\n\r\n", b"{}", heard)
    return connection, pipe, heard


def told(pieces: Iterable[bytes]) -> Told:
    """Ask, and let the engine send `pieces` and close the connection."""
    kept: list[EngineConnection] = []
    connection, pipe, heard = asked(kept)
    for piece in pieces:
        if not pipe.closed:
            connection.data_received(piece)
    was_kept = bool(kept) and not connection.closed
    if not pipe.closed:
        connection.eof_received()
    connection.connection_lost(None)
    return Told(heard.status, heard.body, error=heard.error is not None, kept=was_kept)


ANSWERS = {
    "a length": (WHOLE, b"{}", True),
    "chunks": (
        JSON + b"transfer-encoding: chunked\r\n\r\n1;a=b\r\n{\r\n1\r\n}\r\n0\r\nx: y\r\n\r\n",
        b"{}",
        True,
    ),
    "events": (
        EVENTS
        + b"transfer-encoding: chunked\r\n\r\n9\r\ndata: x\n\n\r\n9\r\ndata: y\n\n\r\n0\r\n\r\n",
        b"data: x\n\ndata: y\n\n",
        True,
    ),
    "interim answers": (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 3 + WHOLE, b"{}", True),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "no reason": (WHOLE.replace(b" OK", b""), b"{}", True),
    "a close": (
        WHOLE.replace(b"{}", b"{}").replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
        b"{}",
        False,
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_cut_anywhere_is_the_same_answer(name: str) -> None:
    data, body, kept = ANSWERS[name]
    whole = told([data])

    assert whole == Told(whole.status, body, error=False, kept=kept)
    assert told(bytewise(data)) == whole
    for cut in range(1, len(data)):
        assert told([data[:cut], data[cut:]]) == whole


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_breaks_off_anywhere_is_an_error(name: str) -> None:
    data, body, _ = ANSWERS[name]
    for cut in range(len(data)):
        broken = told([data[:cut]])
        assert broken.error
        assert body.startswith(broken.body)
        assert not broken.kept


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"<html>hi</html>",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 099 X\r\ncontent-length: 2\r\n\r\n{}",
        b"ICY 200 OK\r\n\r\n",
        JSON + b"x: a\nset-cookie: b\r\ncontent-length: 2\r\n\r\n{}",
        JSON + b"x: a\rset-cookie: b\r\ncontent-length: 2\r\n\r\n{}",
        JSON + b"x: a\r\n set-cookie: b\r\ncontent-length: 2\r\n\r\n{}",
        JSON + b"x: a\x00b\r\ncontent-length: 2\r\n\r\n{}",
        JSON + b"x y: a\r\ncontent-length: 2\r\n\r\n{}",
        JSON + b"x : a\r\ncontent-length: 2\r\n\r\n{}",
        WHOLE.replace(b"\r\n", b"\n"),
        JSON + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        JSON + b"content-length: 2, 2\r\n\r\n{}",
        JSON + b"content-length: +2\r\n\r\n{}",
        JSON + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        JSON + b"transfer-encoding: gzip\r\n\r\n{}",
        JSON + b"transfer-encoding: chunked\r\n\r\n2\n{}\n0\n\n",
        JSON + b"transfer-encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
        JSON + b"transfer-encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
        JSON + b"transfer-encoding: chunked\r\n\r\n2\r\n{}x\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 900_000 + b": y\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 30_000,
    ],
)
def test_what_is_no_answer_is_an_error(data: bytes) -> None:
    size = 1 if len(data) < 10_000 else 60_000
    for pieces in ([data], [data[at : at + size] for at in range(0, len(data), size)]):
        broken = told(pieces)
        assert broken.error
        assert not broken.kept


@pytest.mark.parametrize(
    "endless", [b"x: ", b"x", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nx: "]
)
def test_an_endless_head_is_given_up_before_it_fills_the_memory(endless: bytes) -> None:
    connection, pipe, heard = asked([])
    connection.data_received(endless if b"100" in endless else b"HTTP/1.1 200 OK\r\n" + endless)
    for _ in range(10):
        if not pipe.closed:
            connection.data_received(b"y" * 60_000)

    assert "headers are too large" in str(heard.error)


@pytest.mark.parametrize("extra", [b"x", b"\x00", WHOLE, b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_connection_that_says_more_than_was_asked_is_not_used_again(extra: bytes) -> None:
    for pieces in ([WHOLE + extra], [WHOLE, extra]):
        assert told(pieces) == Told(200, b"{}", error=False, kept=False)


_SNIPPETS = st.sampled_from(
    [
        *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.0 200\r\n", b"\r\n"),
        *(b"content-length: 2\r\n", b"transfer-encoding: chunked\r\n", b"connection: close\r\n"),
        *(b"content-type: application/json\r\n", b"content-type: text/event-stream\r\n"),
        *(
            b"upgrade: x\r\nconnection: upgrade\r\n",
            b"{}",
            b"2\r\n{}\r\n",
            b"0\r\n\r\n",
            b"\n",
            b"x",
        ),
        *(b"HTTP/1.1 204 No Content\r\n", b"data: x\n\n", b"\x00", b"HTTP/1.1 101 S\r\n"),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(_SNIPPETS, max_size=9).map(b"".join) | st.binary(max_size=60), st.data())
def test_whatever_an_engine_sends_it_is_the_same_however_it_is_cut(
    data: bytes, draw: st.DataObject
) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=5)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]

    whole, cut = told([data]), told([piece for piece in pieces if piece])

    assert (cut.status, cut.body, cut.error) == (whole.status, whole.body, whole.error)


@dataclass
class Refusing(Heard):
    """Hangs up as soon as it sees a status that it does not want, and may not hear more."""

    connection: EngineConnection | None = None
    ends: int = 0

    def began(self, answer: Answer) -> None:
        super().began(answer)
        assert self.connection is not None
        self.connection.abort()

    def ended(self) -> None:
        self.ends += 1


def test_who_hangs_up_when_an_empty_answer_begins_hears_nothing_of_its_end() -> None:
    kept: list[EngineConnection] = []
    connection, pipe, heard = (
        EngineConnection("engine", kept.append, AnswerCache()),
        EnginePipe(),
        Refusing(),
    )
    heard.connection = connection
    connection.connection_made(pipe)
    connection.ask(b"POST / HTTP/1.1\r\n\r\n", b"{}", heard)

    connection.data_received(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")

    assert (heard.status, heard.ends, kept) == (503, 0, [])


def test_a_json_answer_without_an_end_is_cut_off() -> None:
    connection, pipe = (
        EngineConnection("engine", list, AnswerCache(), max_answer_bytes=1000),
        EnginePipe(),
    )
    heard = Heard()
    connection.connection_made(pipe)
    connection.ask(b"POST / HTTP/1.1\r\n\r\n", b"{}", heard)
    connection.data_received(JSON + b"transfer-encoding: chunked\r\n\r\n")

    for _ in range(12):
        if not pipe.closed:
            connection.data_received(b"64\r\n" + b"x" * 100 + b"\r\n")

    assert pipe.closed
    assert "larger than 1000 bytes" in str(heard.error)


def test_a_listener_with_a_bug_hears_that_there_is_no_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Buggy(Heard):
        def answered(self, answer: Answer, body: bytes) -> None:
            raise KeyError(body)

    connection, pipe, heard = (
        EngineConnection("engine", lambda _: None, AnswerCache()),
        EnginePipe(),
        Buggy(),
    )
    connection.connection_made(pipe)
    connection.ask(b"POST / HTTP/1.1\r\n\r\n", b"{}", heard)

    connection.data_received(WHOLE)

    assert "internal error" in str(heard.error)
    assert "could not be handed on" in caplog.text
