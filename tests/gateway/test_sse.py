from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.sse import EventAligner, event_data

_pieces = st.lists(
    st.sampled_from([b"data: a", b"\n", b"\n\n", b"\r\n\r\n", b"\r", b": ping", b'{"b": 1}']),
    max_size=30,
)


@given(_pieces, st.lists(st.integers(1, 7), min_size=1))
def test_however_a_stream_is_cut_no_byte_is_lost_or_changed(
    pieces: list[bytes], cuts: list[int]
) -> None:
    stream, aligner, out, at = b"".join(pieces), EventAligner(), b"", 0
    while at < len(stream):
        size = cuts[at % len(cuts)]
        out += aligner.feed(stream[at : at + size])
        assert out == b"" or out.endswith((b"\n\n", b"\r\r", b"\r\n\r\n"))
        at += size

    assert out + aligner.tail == stream


@given(_pieces, st.lists(st.integers(0, 60), max_size=6))
def test_what_is_held_back_is_less_than_an_event(pieces: list[bytes], cuts: list[int]) -> None:
    stream, aligner, at = b"".join(pieces), EventAligner(), 0
    for cut in [*sorted(cuts), len(stream)]:
        aligner.feed(stream[at:cut])
        at = max(at, cut)
        assert not any(mark in aligner.tail for mark in (b"\n\n", b"\r\r", b"\r\n\r\n"))


@given(_pieces | st.lists(st.binary(max_size=9), max_size=9))
def test_data_is_read_from_whole_events_of_any_bytes(pieces: list[bytes]) -> None:
    aligner = EventAligner()
    whole = b"".join(aligner.feed(piece) for piece in pieces)

    assert all(data in whole and data != b"[DONE]" for data in event_data(whole))


def test_a_tail_without_end_is_let_go() -> None:
    aligner = EventAligner()

    assert aligner.feed(b"x" * 2**21) == b"x" * 2**21


def test_events_are_read_without_comments_and_the_end_mark() -> None:
    events = b': ping\n\nevent: a\ndata: {"x": 1}\r\n\r\ndata:{}\n\ndata: [DONE]\n\n'

    assert list(event_data(events)) == [b'{"x": 1}', b"{}"]
