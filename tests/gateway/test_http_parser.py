from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Limits
from gateway.errors import BadRequest, GatewayError
from gateway.head_cache import HeadCache
from gateway.http_parser import Request, RequestParser, Stage

POST = b"POST /v1/x HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SMALL = Limits(max_body_bytes=100, max_head_bytes=400, max_target_bytes=50, max_headers=10)

Outcome = tuple[list[Request], int | None, int]


def outcome(*pieces: bytes, limits: Limits = SMALL, heads: HeadCache | None = None) -> Outcome:
    """What comes of these reads: requests, the status of a refusal, and calls for 100-continue."""
    requests: list[Request] = []
    continues: list[None] = []
    parser = RequestParser(
        limits, heads or HeadCache(), requests.append, lambda: continues.append(None)
    )
    try:
        for piece in pieces:
            parser.feed(piece)
    except BadRequest as error:
        return requests, error.status, len(continues)
    return requests, None, len(continues)


def bytewise(data: bytes) -> list[bytes]:
    return [data[n : n + 1] for n in range(len(data))]


WELL_FORMED = {
    "no body": (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", [b""]),
    "a body": (POST + b"Content-Length: 3\r\n\r\nabc", [b"abc"]),
    "an empty body": (POST + b"Content-Length: 0\r\n\r\n", [b""]),
    "chunks": (CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", [b"abcde"]),
    "no chunk": (CHUNKED + b"0\r\n\r\n", [b""]),
    "chunk extensions": (CHUNKED + b'3;a=1;b="x;y"\r\nabc\r\n0;z\r\n\r\n', [b"abc"]),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\nX-Sum: 1\r\nHost: b\r\n\r\n", [b"a"]),
    "upper case coding": (POST + b"Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n", [b""]),
    "leading empty lines": (b"\r\n\r\n" + POST + b"Content-Length: 1\r\n\r\na", [b"a"]),
    "two pipelined": ((POST + b"Content-Length: 1\r\n\r\na") * 2, [b"a", b"a"]),
    "pipelined of all kinds": (
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        + CHUNKED
        + b"1\r\na\r\n0\r\n\r\n"
        + POST
        + b"Content-Length: 1\r\n\r\nb",
        [b"", b"a", b"b"],
    ),
    "what follows a close": (POST + b"Connection: close\r\n\r\n" + POST + b"\r\n", [b""]),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", [b""]),
    "a client that offers h2c": (
        POST
        + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        + b"Content-Length: 3\r\n\r\nabc"
        + POST
        + b"\r\n",
        [b"abc", b""],
    ),
    "h2c offered with chunks": (
        POST
        + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"1\r\na\r\n0\r\n\r\n",
        [b"a"],
    ),
    "h2c offered before a close": (
        POST
        + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\nContent-Length: 1\r\n\r\na"
        + POST
        + b"\r\n",
        [b"a"],
    ),
    "h2c offered without a body": (POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", [b""]),
    "an absolute target": (b"GET http://a/b?c HTTP/1.1\r\nHost: a\r\n\r\n", [b""]),
}


@pytest.mark.parametrize("name", WELL_FORMED)
def test_what_is_well_formed_is_read_the_same_however_it_is_cut(name: str) -> None:
    data, bodies = WELL_FORMED[name]
    whole = outcome(data)

    assert [request.body for request in whole[0]] == bodies
    assert whole[1] is None
    assert outcome(*bytewise(data)) == whole
    for cut in range(1, len(data)):
        assert outcome(data[:cut], data[cut:]) == whole


REFUSED = {
    # Smuggling: two parties could disagree about where the request ends.
    "length and chunks": (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "chunks and length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
    "two equal lengths": (POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\n", 400),
    "a list of lengths": (POST + b"Content-Length: 3, 3\r\n\r\n", 400),
    "a signed length": (POST + b"Content-Length: +3\r\n\r\n", 400),
    "a negative length": (POST + b"Content-Length: -3\r\n\r\n", 400),
    "a hexadecimal length": (POST + b"Content-Length: 0x3\r\n\r\n", 400),
    "a length of two words": (POST + b"Content-Length: 3 3\r\n\r\n", 400),
    "a length without digits": (POST + b"Content-Length: \r\n\r\n", 400),
    "an immense length": (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
    "another coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "another coding first": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400),
    "another coding last": (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n", 400),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n", 400),
    "nearly chunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n", 400),
    "chunked with a parameter": (POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n", 400),
    "quoted": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n', 400),
    "chunked after a control": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
    "chunked twice": (POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n", 400),
    "identity, then chunked": (
        POST + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n",
        400,
    ),
    "chunks in HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "space before a colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n", 400),
    "a folded header": (POST + b"X: a\r\n b\r\n\r\n", 400),
    "a folded coding": (POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n", 400),
    "space before the first header": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "a bare LF after the request line": (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    "a bare LF after a header": (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
    "a bare LF at the end": (b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    "a bare CR": (POST + b"X: a\rY: b\r\n\r\n", 400),
    "NUL in a value": (POST + b"X: a\x00b\r\n\r\n", 400),
    "a control in a value": (POST + b"X: a\x01b\r\n\r\n", 400),
    "DEL in a value": (POST + b"X: a\x7fb\r\n\r\n", 400),
    "no header name": (POST + b": a\r\n\r\n", 400),
    "a header name that is no token": (POST + b"X(: a\r\n\r\n", 400),
    "a header without a colon": (POST + b"Xyz\r\n\r\n", 400),
    "a chunk size with space": (CHUNKED + b"1 \r\na\r\n0\r\n\r\n", 400),
    "a chunk size after space": (CHUNKED + b" 1\r\na\r\n0\r\n\r\n", 400),
    "a chunk size with 0x": (CHUNKED + b"0x1\r\na\r\n0\r\n\r\n", 400),
    "a signed chunk size": (CHUNKED + b"+1\r\na\r\n0\r\n\r\n", 400),
    "a chunk size with _": (CHUNKED + b"1_0\r\n", 400),
    "no chunk size": (CHUNKED + b"\r\na\r\n0\r\n\r\n", 400),
    "an immense chunk size": (CHUNKED + b"ffffffffffffffffff\r\n", 400),
    "a chunk size ended by LF": (CHUNKED + b"1\na\r\n0\r\n\r\n", 400),
    "a chunk ended by LF": (CHUNKED + b"1\r\na\n0\r\n\r\n", 400),
    "a chunk longer than told": (CHUNKED + b"1\r\nab\r\n0\r\n\r\n", 400),
    "LF in a chunk extension": (CHUNKED + b"1;a\nb\r\na\r\n0\r\n\r\n", 400),
    "NUL in a chunk extension": (CHUNKED + b"1;\x00\r\na\r\n0\r\n\r\n", 400),
    "a length as a trailer": (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", 400),
    "a coding as a trailer": (CHUNKED + b"0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    # Not HTTP/1.1 as it must be
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (POST + b"Host: b\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a later version": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    "an unknown method": (b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a method in lower case": (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a proxy's method": (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "another protocol's method": (b"DESCRIBE / RTSP/1.0\r\nHost: a\r\n\r\n", 400),
    "a relative target": (b"GET foo HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a target of another scheme": (b"OPTIONS rtsp://x RTSP/1.0\r\nHost: a\r\n\r\n", 400),
    "a fragment": (b"GET /#f HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a space in the target": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a control in the target": (b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "another expectation": (POST + b"Expect: coffee\r\nContent-Length: 1\r\n\r\n", 417),
    # Sizes
    "a long body": (POST + b"Content-Length: 101\r\n\r\n", 413),
    "a long body in chunks": (CHUNKED + b"40\r\n" + b"x" * 64 + b"\r\n40\r\n" + b"x" * 64, 413),
    "a long target": (b"GET /" + b"a" * 60, 414),
    "a long header": (POST + b"X: " + b"a" * 400 + b"\r\n\r\n", 431),
    "long headers": (POST + (b"X: " + b"a" * 80 + b"\r\n") * 5 + b"\r\n", 431),
    "many headers": (POST + b"X: a\r\n" * 11, 431),
    "long trailers": (CHUNKED + b"0\r\n" + (b"X: " + b"a" * 80 + b"\r\n") * 5 + b"\r\n", 431),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_http_is_refused_however_it_is_cut(name: str) -> None:
    data, status = REFUSED[name]

    assert outcome(data) == ([], status, 0)
    assert outcome(*bytewise(data)) == ([], status, 0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_came_before_it_is_answered_still(name: str) -> None:
    before = POST + b"Content-Length: 3\r\n\r\nabc"
    data, status = REFUSED[name]

    requests, told, _ = outcome(before + data)

    assert [request.body for request in requests] == [b"abc"]
    assert told == status


@pytest.mark.parametrize(
    "endless", [b"GET /", POST + b"X: ", CHUNKED + b"0\r\nX: ", CHUNKED + b"1;"]
)
def test_what_never_ends_is_refused_before_it_fills_the_memory(endless: bytes) -> None:
    requests, status, _ = outcome(endless, *([b"a" * 50] * 40))

    assert requests == []
    assert status in {414, 431}


def test_small_chunks_are_no_offence() -> None:
    assert outcome(CHUNKED, *bytewise(b"1\r\na\r\n" * 100), b"0\r\n\r\n")[0][0].body == b"a" * 100


@pytest.mark.parametrize("name", WELL_FORMED)
def test_what_is_cut_short_is_no_request(name: str) -> None:
    data, bodies = WELL_FORMED[name]
    if len(bodies) == 1 and "close" not in name:
        for cut in range(len(data)):
            assert outcome(data[:cut]) == ([], None, 0)


def test_a_request_is_what_its_head_says() -> None:
    data = (
        b"POST /a%20b?c=d HTTP/1.1\r\nHost: a\r\nX-Y:  1 \r\nx-y: 2\r\nContent-Length: 1\r\n\r\nz"
    )
    (request,), _, _ = outcome(data)

    assert (request.head.method, request.head.path, request.body) == (b"POST", "/a b", b"z")
    assert request.head.headers["x-y"] == "1"  # the first counts
    assert request.head.keep_alive


@pytest.mark.parametrize(
    ("head", "keep_alive"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n", False),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\nConnection: close\r\n", False),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: foo, close\r\n", False),
        (b"GET / HTTP/1.0\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n", True),
    ],
)
def test_a_connection_is_kept_if_the_client_wants_it(head: bytes, keep_alive: bool) -> None:
    heads = HeadCache()
    for _ in range(2):
        (request,), _, _ = outcome(head + b"\r\n", heads=heads)
        assert request.head.keep_alive is keep_alive


@pytest.mark.parametrize(
    ("headers", "calls"),
    [
        (b"Expect: 100-continue\r\nContent-Length: 3\r\n", 1),
        (b"Expect: 100-Continue\r\nTransfer-Encoding: chunked\r\n", 1),
        (b"Expect: 100-continue\r\nContent-Length: 0\r\n", 0),
        (b"Content-Length: 3\r\n", 0),
    ],
)
def test_a_client_that_waits_is_told_to_go_on(headers: bytes, calls: int) -> None:
    assert outcome(POST + headers + b"\r\n")[2] == calls


def test_the_stage_says_what_is_waited_for() -> None:
    parser = RequestParser(SMALL, HeadCache(), lambda _: None, lambda: None)
    stages = []
    for piece in (
        b"\r\n",
        b"POST",
        b" / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n",
        b"a",
        b"b",
    ):
        parser.feed(piece)
        stages.append(parser.stage)

    assert stages == [Stage.IDLE, Stage.HEAD, Stage.BODY, Stage.BODY, Stage.IDLE]


@pytest.mark.parametrize("name", WELL_FORMED)
def test_a_head_that_is_known_means_what_it_meant(name: str) -> None:
    data, _ = WELL_FORMED[name]
    heads = HeadCache()

    assert outcome(data, heads=heads) == outcome(data, heads=heads) == outcome(data)


def test_a_known_head_with_another_length_has_another_body() -> None:
    heads = HeadCache()
    for body in (b"a", b"bc", b"", b"d" * 100):
        data = POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        told = outcome(data, heads=heads)
        assert told == outcome(data)
        assert (told[0][0].body, told[1]) == (body, None)
    assert outcome(POST + b"Content-Length: 101\r\n\r\n" + b"x" * 101, heads=heads)[1] == 413
    assert outcome(POST + b"Content-Length: 03\r\n\r\nabcd", heads=heads)[1] == 400


def test_a_known_head_with_other_ids_tells_them() -> None:
    heads = HeadCache()
    for number in range(3):
        lines = b"x-request-id: r%d\r\nTraceparent: t%d\r\nx-request-id: z\r\n" % (number, number)
        (request,), _, _ = outcome(POST + lines + b"Content-Length: 1\r\n\r\na", heads=heads)
        assert request.head.headers["x-request-id"] == f"r{number}"
        assert request.head.headers["traceparent"] == f"t{number}"
        assert request.body == b"a"
    assert len(heads._heads) == 1


@pytest.mark.parametrize("length", [b"a", b"1a", b"-1", b"1.0", b"0x1", b"9999999999"])
def test_a_known_head_with_a_bad_length_is_not_known(length: bytes) -> None:
    heads = HeadCache()
    outcome(POST + b"Content-Length: 1\r\n\r\na", heads=heads)

    assert outcome(POST + b"Content-Length: " + length + b"\r\n\r\n", heads=heads)[1] in {400, 413}


_PIECES = st.lists(
    st.sampled_from(
        [
            *(b"GET / HTTP/1.1\r\n", b"POST /v1/x HTTP/1.1\r\n", b"POST / HTTP/1.0\r\n"),
            *(b"Host: a\r\n", b"Content-Length: 3\r\n", b"content-length: 2\r\n"),
            *(b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"X: y\r\n"),
            *(b"x-request-id: 7\r\n", b"X-Request-Id: a b\r\n", b"traceparent: t\r\n"),
            *(b"Expect: 100-continue\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n"),
            *(b"\r\n", b"\n", b"\r", b" ", b"0\r\n\r\n", b"3\r\nabc\r\n", b"abc", b"ab", b"\x00"),
        ]
    ),
    max_size=14,
).map(b"".join)
_REQUESTS = st.lists(st.sampled_from([data for data, _ in WELL_FORMED.values()]), max_size=4).map(
    b"".join
)


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(_REQUESTS))
    for _ in range(draw(st.integers(0, 3))):
        if data:
            at = draw(st.integers(0, len(data) - 1))
            data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


@settings(max_examples=400, deadline=None)
@given(st.one_of(_PIECES, _REQUESTS, _damaged(), st.binary(max_size=80)), st.data())
def test_whatever_comes_is_read_the_same_however_it_is_cut(
    data: bytes, draw: st.DataObject
) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    heads = HeadCache()

    whole = outcome(data, heads=heads)

    assert outcome(*pieces) == whole
    assert outcome(*pieces, heads=heads) == whole
    assert outcome(data, heads=heads) == whole
    assert whole[1] is None or whole[1] in {400, 413, 414, 417, 431}


@given(st.binary(max_size=200))
def test_only_our_errors_come_out(data: bytes) -> None:
    parser = RequestParser(SMALL, HeadCache(), lambda _: None, lambda: None)
    for piece in bytewise(data):
        try:
            parser.feed(piece)
        except GatewayError:
            assert parser.finished


def test_a_body_in_tiny_chunks_takes_little_more_than_its_bytes() -> None:
    heard: list[Request] = []
    parser = RequestParser(Limits(), HeadCache(), heard.append, lambda: None)
    parser.feed(CHUNKED)
    tracemalloc.start()
    try:
        for _ in range(100):
            parser.feed(b"2\r\nab\r\n" * 1000)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    parser.feed(b"0\r\n\r\n")

    assert held < 2 * 200_000
    assert [request.body for request in heard] == [b"ab" * 100_000]
