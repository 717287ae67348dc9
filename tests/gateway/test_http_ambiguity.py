"""Requests that others may read otherwise, and exactly what comes of them: answers, what the engine saw.

Behind every case follows a plain request that would be answered if the server still believed to know
where requests begin. The parser's own table is in `test_http_parser`.
"""

from __future__ import annotations

import pytest

from tests.gateway.engines import (
    CHAT,
)
from tests.gateway.http_stand import (
    BODY,
    CHUNKED,
    CHUNKS,
    HIDDEN,
    LAST,
    LENGTH,
    PLAIN,
    SIZE,
    START,
    Outcome,
    a_stand,
    bytewise,
)
from tests.gateway.test_http_parser import REFUSED

PASSED = {
    # name: bytes, statuses before LAST's, requests that reach the engine
    "nothing": (b"", [], 0),
    "one": (PLAIN, [200], 1),
    "three pipelined": (PLAIN * 3, [200] * 3, 3),
    "chunks": (CHUNKED + CHUNKS, [200], 1),
    "a chunk per byte": (
        CHUNKED + b"".join(b"1\r\n%b\r\n" % piece for piece in bytewise(BODY)) + b"0\r\n\r\n",
        [200],
        1,
    ),
    "chunk extensions": (
        CHUNKED + SIZE + b';a;b=c;d="e f"\r\n' + BODY + b"\r\n0;last\r\n\r\n",
        [200],
        1,
    ),
    "a chunk size in capitals": (CHUNKED + SIZE.upper() + CHUNKS[len(SIZE) :], [200], 1),
    "a chunk size with zeros": (CHUNKED + b"0" * 40 + CHUNKS, [200], 1),
    "a last chunk of zeros": (CHUNKED + CHUNKS[:-5] + b"0000\r\n\r\n", [200], 1),
    "trailers that say other things": (
        CHUNKED + CHUNKS[:-2] + b"Host: evil\r\nx-request-id: evil\r\nExpect: x\r\n\r\n",
        [200],
        1,
    ),
    "a length with blanks around": (
        START + LENGTH.replace(b": ", b": \t ").replace(b"\r", b" \t \r") + b"\r\n" + BODY,
        [200],
        1,
    ),
    "a length with zeros": (
        START + LENGTH.replace(b": ", b": 000") + b"\r\n" + BODY,
        [200],
        1,
    ),
    "headers that only look like framing": (
        START + b"Transfer_Encoding: chunked\r\nContent_Length: 3\r\n" + LENGTH + b"\r\n" + BODY,
        [200],
        1,
    ),
    "framing named as one hop's": (
        START + b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
        [200],
        1,
    ),
    "a GET with a body that is a request": (
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        [200],
        0,
    ),
    "a HEAD with a body that is a request": (
        b"HEAD /health HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        [200],
        0,
    ),
    "a request inside of a chunk": (
        CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN),
        [400],
        0,
    ),
    "a request inside of a body": (
        START + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        [400],
        0,
    ),
    "another authority in the target": (PLAIN.replace(b"POST ", b"POST http://evil:1"), [200], 1),
    "an IPv6 host": (PLAIN.replace(b"Host: a", b"Host: [::1]:80"), [200], 1),
    "an empty host": (PLAIN.replace(b"Host: a", b"Host:"), [200], 1),
    "the server as a whole": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", [404], 0),
    "a path of two slashes": (PLAIN.replace(b"POST /", b"POST //"), [404], 0),
    "a path that climbs": (PLAIN.replace(b"POST /", b"POST /../"), [404], 0),
    "NUL in a path, encoded": (PLAIN.replace(CHAT.encode(), CHAT.encode() + b"%00"), [404], 0),
    "line breaks in a path, encoded": (
        b"GET /v1/models/a%0d%0ax-evil:%201 HTTP/1.1\r\nHost: a\r\n\r\n",
        [404],
        0,
    ),
    "WebSocket": (
        b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        [200],
        0,
    ),
    "h2c": (
        START + b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + LENGTH + b"\r\n" + BODY,
        [200],
        1,
    ),
    "HTTP/1.0 that stays": (
        PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: a", b"Connection: keep-alive"),
        [200],
        1,
    ),
    "an id of another alphabet": (
        PLAIN.replace(b"Host: a", b"Host: a\r\nx-request-id: \xff<>"),
        [200],
        1,
    ),
}


@pytest.mark.parametrize("name", PASSED)
async def test_what_is_odd_but_clear_is_answered(name: str) -> None:
    data, statuses, seen = PASSED[name]
    expected = Outcome([*statuses, 200], seen, went_on=True)
    async with a_stand() as stand:
        assert await stand.outcome([data + LAST]) == expected
        assert await stand.outcome([data + LAST]) == expected  # now its head is known
        assert await stand.outcome(bytewise(data + LAST)) == expected


# Each would be another message to a party that reads it otherwise.
SMUGGLED = {
    "CL.TE": START + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "TE.CL": START + b"Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n" + CHUNKS + HIDDEN,
    **{
        f"TE.TE {coding!r}": START + coding + LENGTH + b"\r\n0\r\n\r\n" + HIDDEN
        for coding in (
            b"Transfer-Encoding: xchunked\r\n",
            b"Transfer-Encoding: chunked, identity\r\n",
            b"Transfer-Encoding: identity, chunked\r\n",
            b"Transfer-Encoding: chunked, chunked\r\n",
            b"Transfer-Encoding: ,chunked\r\n",
            b"Transfer-Encoding: chunked,\r\n",
            b"Transfer-Encoding:\r\n",
            b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n",
            b"Transfer-Encoding : chunked\r\n",
            b"Transfer-Encoding\t: chunked\r\n",
            b"Transfer-Encoding\x0b: chunked\r\n",
            b" Transfer-Encoding: chunked\r\n",
            b"X: y\n Transfer-Encoding: chunked\r\n",
            b"X: y\nTransfer-Encoding: chunked\r\n",
            b"X: y\rTransfer-Encoding: chunked\r\n",
            b"Transfer-Encoding:\n chunked\r\n",
            b"Transfer-Encoding: \x00chunked\r\n",
            b"Transfer-Encoding: chunked\x00\r\n",
            b"Transfer-Encoding: \xa0chunked\r\n",
            b"Transfer-Encoding: chun\xc5\xbfed\r\n",
        )
    },
    **{
        f"length {length!r}": START + length + b"\r\n" + BODY + HIDDEN
        for length in (
            LENGTH + LENGTH,
            LENGTH + b"Content-Length: 0\r\n",
            b"Content-Length: 0\r\n" + LENGTH,
            LENGTH.replace(b": ", b": +"),
            LENGTH.replace(b": ", b": -"),
            LENGTH.replace(b": ", b": 0x"),
            LENGTH.replace(b": ", b": ,"),
            LENGTH.replace(b"\r", b",\r"),
            LENGTH.replace(b"\r", b";\r"),
            LENGTH.replace(b"\r", b".0\r"),
            LENGTH.replace(b"\r", b" 0\r"),
            LENGTH.replace(b"\r", b"_0\r"),
            LENGTH.replace(b"\r", b"\x0c\r"),
            LENGTH.replace(b"\r", b"\r\n 0\r"),
            LENGTH.replace(b": ", b": \x0b"),
            LENGTH.replace(b": ", b" : "),
            LENGTH.replace(b"\r", b", %d\r" % len(BODY)),
            "Content-Length: \u0667\u0660\r\n".encode(),
            b'Content-Length: "70"\r\n',
            b"Content-Length:\r\n",
        )
    },
    **{
        f"chunk {chunk!r}": CHUNKED + chunk + b"\r\n0\r\n\r\n" + HIDDEN
        for chunk in (
            SIZE + b" \r\n" + BODY,
            SIZE + b"\t\r\n" + BODY,
            b" " + SIZE + b"\r\n" + BODY,
            b"+" + SIZE + b"\r\n" + BODY,
            b"-" + SIZE + b"\r\n" + BODY,
            b"0x" + SIZE + b"\r\n" + BODY,
            SIZE + b"h\r\n" + BODY,
            SIZE + b"_\r\n" + BODY,
            SIZE + b"\n" + BODY,
            SIZE + b"\r" + BODY,
            SIZE + b"\r\r\n" + BODY,
            SIZE + b";\r\n" + BODY,
            SIZE + b" ;a\r\n" + BODY,
            SIZE + b";a\n" + BODY,
            SIZE + b";a\rb\r\n" + BODY,
            SIZE + b';a="\r\n"\r\n' + BODY,
            SIZE + b";\x00\r\n" + BODY,
            b"1" + b"0" * 16 + b"\r\n" + BODY,
            b"f" * 17 + b"\r\n" + BODY,
            SIZE + b"\r\n" + BODY + b"x",
            SIZE + b"\r\n" + BODY + b"\r\n",
            SIZE + b"\r\n" + BODY[:-1],
        )
    },
    "LF after the last chunk": CHUNKED + CHUNKS[:-2] + b"\n" + HIDDEN,
    "LF in a trailer": CHUNKED + CHUNKS[:-2] + b"x: y\n\r\n" + HIDDEN,
    "a folded trailer": CHUNKED + CHUNKS[:-2] + b"x: y\r\n z\r\n\r\n" + HIDDEN,
    "a request as a trailer": CHUNKED + CHUNKS[:-2] + HIDDEN,
    "a length as a trailer": CHUNKED + CHUNKS[:-2] + LENGTH + b"\r\n" + HIDDEN,
    "LF for CRLF": (START + LENGTH).replace(b"\r\n", b"\n") + b"\n" + BODY + HIDDEN,
    "CR for CRLF": (START + LENGTH).replace(b"\r\n", b"\r") + b"\r" + BODY + HIDDEN,
    "NUL before it": b"\x00" + PLAIN + HIDDEN,
    "chunks in HTTP/1.0": CHUNKED.replace(b"/1.1", b"/1.0") + CHUNKS + HIDDEN,
    "chunks and a length behind an upgrade": (
        START
        + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n"
        + LENGTH
        + b"\r\n"
        + CHUNKS
        + HIDDEN
    ),
    "two hosts": PLAIN.replace(b"Host: a", b"Host: a\r\nHost: b") + HIDDEN,
    **{
        f"host {host!r}": PLAIN.replace(b"Host: a", b"Host: " + host) + HIDDEN
        for host in (
            b"a b",
            b"a, b",
            b"a/b",
            b"u@a",
            b"a\\b",
            b"\xff",
            b"a:b",
            b"[::1",
            b"a?b",
            b"a#b",
        )
    },
    **{
        f"target {target!r}": PLAIN.replace(CHAT.encode(), target) + HIDDEN
        for target in (
            b"http:///v1",
            b"http://u:p@a/v1",
            b"http://[::1/v1",
            b"ftp://a/v1",
            b"a:1",
            b"",
        )
    },
    "PROXY protocol": b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n" + HIDDEN,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN,
}


@pytest.mark.parametrize("name", SMUGGLED)
async def test_what_could_be_read_in_two_ways_is_refused_and_nothing_hidden_gets_through(
    name: str,
) -> None:
    expected = Outcome([400], 0, went_on=False)
    async with a_stand() as stand:
        for pieces in ([SMUGGLED[name] + LAST], bytewise(SMUGGLED[name] + LAST)):
            assert await stand.outcome(pieces) == expected
        before = Outcome([200, 400], 1, went_on=False)
        assert await stand.outcome([PLAIN + SMUGGLED[name] + LAST]) == before


@pytest.mark.parametrize("name", REFUSED)
async def test_what_the_parser_refuses_ends_the_connection_with_its_status(name: str) -> None:
    limits = {
        "max_body_bytes": 100,
        "max_head_bytes": 400,
        "max_target_bytes": 50,
        "max_headers": 10,
    }
    data, status = REFUSED[name]
    async with a_stand(**limits) as stand:
        for pieces in ([data + LAST], bytewise(data + LAST)):
            assert await stand.outcome(pieces) == Outcome([status], 0, went_on=False)


ENDS = {
    "close": PLAIN.replace(b"Host: a", b"Host: a\r\nConnection: close"),
    "close among others": PLAIN.replace(b"Host: a", b"Host: a\r\nConnection: x, Close ,y"),
    "close with h2c": START
    + b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n"
    + LENGTH
    + b"\r\n"
    + BODY,
    "HTTP/1.0": PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
}


@pytest.mark.parametrize("name", ENDS)
async def test_behind_the_end_of_a_connection_nothing_is_read(name: str) -> None:
    async with a_stand() as stand:
        for pieces in ([ENDS[name] + HIDDEN], bytewise(ENDS[name] + HIDDEN)):
            assert await stand.outcome(pieces) == Outcome([200], 1, went_on=False)
