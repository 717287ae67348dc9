"""Features, prefix index, hash ring, pace: what routing decides by."""

from __future__ import annotations

import base64
import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.call import Call
from gateway.routing.features import BLOCK_ENDS, features_of, images, prefix_hashes
from gateway.routing.hash_ring import HashRing
from gateway.routing.pace import Pace, outliers, speeds
from gateway.routing.prefix_index import PrefixIndex
from tests.gateway.engines import CHAT

IMAGE = base64.b64encode(Random(0).randbytes(30_000)).decode()


def a_call(body: dict[str, object], path: str = CHAT, **headers: str) -> Call:
    return Call("http", path, "m", json.dumps(body).encode(), "id", headers)


def a_message(content: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": content}]}


# Features


def test_text_is_a_token_for_four_bytes() -> None:
    features = features_of(a_call(a_message("word " * 1000)))

    assert features.prompt_tokens == pytest.approx(1250, rel=0.02)
    assert (features.num_images, features.session) == (0, None)


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}], 1),
        ([{"image_url": {"url": f"data:image/png;base64,{IMAGE}"}, "type": "image_url"}], 1),
        ([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}] * 3, 3),
        ([{"type": "input_image", "image_url": f"data:image/png;base64,{IMAGE}"}], 1),
        (
            [
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": IMAGE},
                }
            ],
            1,
        ),
        ([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}], 1),
        ([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}] * 2, 2),
        ('he said "image" and "image_url": {"x": 1}', 0),
        ("data:image/png;base64,AAAA is text here", 0),
    ],
)
def test_images_are_counted_and_are_no_text(content: object, count: int) -> None:
    features = features_of(a_call(a_message(content)))

    assert features.num_images == count
    assert features.prompt_tokens < 150 + 1024 * count


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" , ", " : ")])
def test_images_are_found_however_the_json_is_spaced(separators: tuple[str, str]) -> None:
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}]
    body = json.dumps(a_message(content), separators=separators).encode()

    count, inline_bytes = images(body)

    assert count == 1
    assert inline_bytes == len(IMAGE)


def test_a_prompt_begins_where_its_key_is() -> None:
    text = "word " * 500
    for path, key in (
        (CHAT, "messages"),
        ("/v1/completions", "prompt"),
        ("/v1/embeddings", "input"),
        ("/v1/responses", "input"),
        ("/v1/responses", "instructions"),
        ("/v1/messages", "system"),
    ):
        one = features_of(a_call({"model": "m", "x": 1, key: text}, path))
        other = features_of(a_call({"model": "longer", "temperature": 0.5, key: text}, path))

        assert one.hashes
        assert one.hashes == other.hashes


def test_conversations_share_the_hashes_of_their_common_beginning() -> None:
    first = a_message("word " * 1000)
    second = {"model": "m", "messages": [*first["messages"], {"role": "user", "content": "more"}]}

    short, long = (features_of(a_call(body)).hashes for body in (first, second))

    assert long[: len(short) - 1] == short[: len(short) - 1]


@given(st.binary(max_size=6000), st.integers(0, 3000), st.binary(min_size=1, max_size=1))
def test_hashes_tell_prompts_apart_from_the_first_block_that_differs(
    prompt: bytes, at: int, byte: bytes
) -> None:
    hashes = prefix_hashes(prompt)
    changed = prompt[:at] + byte + prompt[at + 1 :] if at < len(prompt) else prompt
    first_changed = next((n for n, end in enumerate(BLOCK_ENDS) if at < end), 0)

    assert len(hashes) == sum(end <= len(prompt) for end in BLOCK_ENDS)
    for n, (one, other) in enumerate(zip(hashes, prefix_hashes(changed), strict=True)):
        assert (one == other) is (changed == prompt or n < first_changed)


@given(st.binary(max_size=20_000))
def test_any_bytes_have_features(body: bytes) -> None:
    features = features_of(Call("http", CHAT, "m", body, "id", {}))

    assert features.prompt_tokens > 0
    assert features.num_bytes <= len(body)


def test_a_huge_body_costs_a_bounded_number_of_blocks() -> None:
    assert len(prefix_hashes(bytes(10_000_000))) == len(BLOCK_ENDS)


# Prefix index


def test_the_index_knows_who_has_seen_how_much() -> None:
    index = PrefixIndex()
    index.add([1, 2, 3], 0b01)
    index.add([1, 2], 0b10)

    assert index.holders([1, 2, 3, 4]) == [0b11, 0b11, 0b01]
    assert index.holders([9, 1]) == []


def test_what_an_endpoint_has_lost_is_forgotten() -> None:
    index = PrefixIndex()
    index.add([1, 2], 0b01)
    index.add([1], 0b10)

    index.forget(0b01)

    assert index.holders([1, 2]) == [0b10]


@given(st.lists(st.lists(st.integers(0, 200), max_size=8), max_size=200), st.integers(2, 40))
def test_the_index_is_bounded_and_what_was_used_just_now_is_in_it(
    prompts: list[list[int]], most: int
) -> None:
    index = PrefixIndex(most)
    for number, hashes in enumerate(prompts):
        index.add(hashes, 1 << number % 4)
        assert len(index) <= most + 8
        if len(hashes) <= most // 2:
            assert all(mask & 1 << number % 4 for mask in index.holders(hashes))


def test_what_is_used_again_and_again_is_not_forgotten() -> None:
    index = PrefixIndex(100)
    for number in range(1000):
        index.add([7, 1000 + number], 1)

    assert index.holders([7]) == [1]
    assert index.holders([1000]) == []


# Hash ring


@given(st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
def test_a_key_moves_only_when_its_home_goes(names: set[str], key: int) -> None:
    ring = HashRing(dict.fromkeys(names, 1.0))
    home = ring.home(key)
    gone = next(name for name in sorted(names) if name != home)

    assert HashRing(dict.fromkeys(names - {gone}, 1.0)).home(key) == home
    walked = list(ring.walk(key))
    assert walked[0] == home
    assert set(walked) == names
    assert len(walked) == len(names)


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdefghij"), st.sampled_from([0.5, 1.0, 1.0, 7.0])),
        min_size=2,
        max_size=6,
    )
)
def test_a_ring_that_was_changed_is_the_one_that_is_made_anew(
    weights: list[dict[str, float]],
) -> None:
    ring = HashRing()
    for each in weights:
        ring.weigh(each)

    anew = HashRing(weights[-1])
    assert [list(ring.walk(key)) for key in range(50)] == [
        list(anew.walk(key)) for key in range(50)
    ]


def test_who_comes_to_a_large_ring_stands_where_it_would_have_stood_from_the_start() -> None:
    names = [f"replica-{number}" for number in range(60)]
    ring = HashRing(dict.fromkeys(names, 1.0))
    for left in (names[1:], names, names[:-1]):
        ring.weigh(dict.fromkeys(left, 1.0))

        anew = HashRing(dict.fromkeys(left, 1.0))
        assert [ring.home(key) for key in range(500)] == [anew.home(key) for key in range(500)]


def test_keys_spread_in_proportion_to_weights() -> None:
    ring = HashRing({"a": 1.0, "b": 3.0})

    homes = [ring.home(key) for key in range(4000)]

    assert homes.count("b") / 4000 == pytest.approx(0.75, abs=0.08)
    assert HashRing({}).home(1) is None


# Pace


def a_pace(seconds_per_work: float, *, crowd: float = 1, requests: int = 50) -> Pace:
    pace = Pace()
    for _ in range(requests):
        pace.observe(seconds=100 * seconds_per_work, work=100, crowd=crowd, now=0)
    return pace


def test_speeds_keep_to_the_plan_as_long_as_all_are_equally_off_it() -> None:
    paces = [a_pace(0.03), a_pace(0.01)]

    assert speeds([100, 300], paces, 0) == [100, 300]


def test_an_endpoint_that_is_off_its_plan_is_corrected_and_forgiven_with_time() -> None:
    paces = [a_pace(0.04), a_pace(0.01), a_pace(0.01)]

    slow, fast, _ = speeds([100, 100, 100], paces, 0)
    assert fast == 100
    assert slow == pytest.approx(25, rel=0.4)
    assert speeds([100, 100, 100], paces, 3600)[0] == 100


def test_an_endpoint_is_not_taken_for_slow_because_it_is_busy() -> None:
    # a + b x n with a = 8 b, as a batch costs: n = 2 and n = 24
    paces = [a_pace(0.010, crowd=2), a_pace(0.032, crowd=24)]

    assert speeds([100, 100], paces, 0) == [100, 100]


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ((1, 1, 1), []),
        ((1, 1, 6), [2]),
        ((1, 6), []),  # one peer is too few to judge by
        ((1, 1, 6, 9), [3, 2]),
        ((1, 1, 1, 6, 9), [4, 3]),
        ((1, 1, 4.9), []),
    ],
)
def test_who_is_far_slower_than_the_peers_is_an_outlier(
    seconds: tuple[float, ...], found: list[int]
) -> None:
    assert outliers([a_pace(s) for s in seconds], 5.0) == found


@given(st.lists(st.floats(0.001, 1000), max_size=9))
def test_at_most_half_are_outliers(seconds: list[float]) -> None:
    assert len(outliers([a_pace(s, requests=9) for s in seconds], 5.0)) <= len(seconds) / 2
