from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.head_cache import HeadCache
from tests.gateway.test_http_parser import Outcome, outcome

# Headers as clients, and those who mean ill, write them: in all the ways that the cache tells apart.
_VALUES = st.sampled_from([b"1", b"a", b"a b", b"", b"0", b"03", b"x" * 130, b"\xff", b"1, 1"])
_NAMES = st.sampled_from(
    [
        *(b"x-request-id", b"X-Request-Id", b"X-REQUEST-ID", b"traceparent", b"Traceparent"),
        *(b"content-length", b"Content-Length", b"CONTENT-LENGTH", b"x-other", b"connection"),
        *(b"transfer-encoding", b"expect", b"upgrade", b"host", b"x-request-id "),
    ]
)
_LINES = st.builds(
    lambda name, colon, value, end: name + colon + value + end,
    _NAMES,
    st.sampled_from([b": ", b":", b":  ", b":\t"]),
    _VALUES,
    st.sampled_from([b"\r\n", b" \r\n", b"\n", b"\r\n "]),
)
_REQUESTS = st.builds(
    lambda start, lines, body: b"".join((start, *lines, b"\r\n", body)),
    st.sampled_from([b"POST /a?b HTTP/1.1\r\nHost: a\r\n", b"GET /a HTTP/1.0\r\n"]),
    st.lists(_LINES, max_size=4),
    st.sampled_from([b"", b"x", b"xyz", b"x" * 120]),
)
FIRST = b"POST /a HTTP/1.1\r\nHost: a\r\n"


@settings(max_examples=600, deadline=None)
@given(st.lists(_REQUESTS, min_size=1, max_size=6))
@example([FIRST + b"x-request-id: a b\r\nx-request-id: 1\r\n\r\n"] * 2)
@example(
    [
        FIRST + b"x-request-id:  1\r\nx-request-id: 1\r\n\r\n",
        FIRST + b"x-request-id:  1\r\nx-request-id: 2\r\n\r\n",
    ]
)
def test_what_is_known_of_other_requests_changes_nothing(requests: list[bytes]) -> None:
    heads = HeadCache()

    told = [outcome(request, heads=heads) for request in requests * 2]

    assert told == [alone(request) for request in requests * 2]


def alone(request: bytes) -> Outcome:
    return outcome(request, heads=HeadCache())


@settings(max_examples=200, deadline=None)
@given(st.lists(_REQUESTS, min_size=2, max_size=4), st.data())
def test_nor_does_how_a_connection_is_cut(requests: list[bytes], draw: st.DataObject) -> None:
    data = b"".join(requests)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=5)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    heads = HeadCache()
    for request in requests:
        outcome(request, heads=heads)

    assert outcome(*pieces, heads=heads) == outcome(*pieces) == outcome(data)
    assert outcome(data, heads=heads) == outcome(data)
