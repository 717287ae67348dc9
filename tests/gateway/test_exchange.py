from __future__ import annotations

import asyncio
import json

import pytest

from gateway.endpoints import ServedModel
from gateway.errors import GatewayError
from tests.gateway.engines import a_table, an_endpoint
from tests.gateway.exchanges import (
    DONE,
    Scene,
    a_call,
    an_event,
    chunks_of,
    settle,
    some_endpoints,
    text_of,
)

PLAIN = [(b"content-type", b"text/plain")]


@pytest.mark.parametrize("extra", [b'"\xff"', b"1" * 5000], ids=["no UTF-8", "a huge number"])
async def test_a_body_that_cannot_be_renamed_is_refused_and_gives_its_place_back(
    extra: bytes,
) -> None:
    body = b'{"model":"chat","x":' + extra + b"}"
    scene = Scene(some_endpoints(1, served_model_name="other"), a_call(body))

    await scene.begin()

    assert scene.client.error is not None
    assert scene.client.error.status == 400
    scene.check_end()


@pytest.mark.parametrize("pooled", [True, False])
async def test_an_empty_503_is_tried_elsewhere_and_answered_once(pooled: bool) -> None:
    scene = Scene(some_endpoints(2), a_call())
    scene.engines.pooled = {"e0", "e1"} if pooled else set()
    await scene.begin()
    first = scene.connection

    first.begins(503, [])
    await settle()

    second = scene.connection
    assert second is not first
    second.begins()
    second.says(an_event("yes", "stop") + DONE)
    second.ends()
    assert text_of(scene.client.body) == "yes"
    scene.check_end()


async def test_who_waited_in_a_stream_is_told_of_a_refusal_in_the_engines_words() -> None:
    scene = Scene(some_endpoints(1), a_call(), limits={"heartbeat_s": 0.01})
    await scene.begin()
    await asyncio.sleep(0.05)
    assert scene.client.body.startswith(b": the request waits\n\n")

    refusal = {"message": "too long", "type": "BadRequestError", "param": "messages", "code": 400}
    scene.connection.answers(400, json.dumps({"error": refusal}).encode())

    assert scene.client.error is not None
    assert scene.client.error.body() == {"error": refusal}
    assert scene.finished[0].status == 400
    scene.check_end()


async def test_after_an_error_for_a_first_event_the_next_engines_answer_is_taken_as_it_is() -> None:
    table = a_table(
        an_endpoint("http://e0:1", id="e0", served_model_name="zero"),
        an_endpoint("http://e1:1", id="e1", served_model_name="one"),
    )
    scene = Scene(table, a_call())
    await scene.begin()
    names = {"e0": "zero", "e1": "one"}

    for text in (b'data: {"error":{"message":"no memory","code":500}}\n\ndata: {"ha', None):
        connection = scene.connection
        connection.begins()
        connection.says(text or an_event("yes", "stop", model=names[connection.endpoint.key]))
        await settle()
    scene.connection.says(DONE)
    scene.connection.ends()

    assert scene.client.state == "over"
    assert scene.client.error is None
    assert [chunk["model"] for chunk in chunks_of(scene.client.body)] == ["chat"]
    scene.check_end()


async def test_a_plain_answer_may_follow_a_stream_that_never_said_anything() -> None:
    scene = Scene(some_endpoints(2), a_call())
    await scene.begin()
    scene.connection.begins()
    scene.connection.breaks()
    await settle()

    scene.connection.begins(200, PLAIN)
    scene.connection.says(b"plain")
    scene.connection.ends()

    assert (scene.client.body, scene.client.error) == (b"plain", None)
    scene.check_end()


async def test_a_client_whose_time_is_over_is_not_sent_to_another_model() -> None:
    small = an_endpoint("http://s:1", id="s", model="small")
    models = ServedModel(name="chat", fallback=("small",), scalable=True), ServedModel(name="small")
    scene = Scene(a_table(small, models=models), a_call(timeout_s=0.01))

    await scene.begin()
    await asyncio.sleep(0.05)

    assert scene.client.error is not None
    assert scene.client.error.status == 503
    scene.check_end()


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices":5}',
        b'{"choices":["x"]}',
        b'{"choices":[{"delta":"x"}]}',
        b'{"choices":[{"delta":{"content":"a"},"token_ids":5}]}',
        b'{"choices":[{"text":{"a":1}}],"usage":[1]}',
        b"[1]",
        b"3",
        b'"x"',
        b"{",
    ],
)
@pytest.mark.parametrize("end", [b"\n\n", b""])
@pytest.mark.parametrize("after", [b"", an_event("a")], ids=["first", "later"])
async def test_no_event_however_damaged_leaves_a_client_waiting(
    event: bytes, end: bytes, after: bytes
) -> None:
    """Neither of the first engine, nor of one that goes on with its stream."""
    scene = Scene(some_endpoints(1), a_call())
    await scene.begin()

    for _ in range(20):
        if scene.client.state == "over":
            break
        connection = scene.connection
        if connection.is_open:
            connection.begins()
            if after:
                connection.says(after)
            connection.says(b"data: " + event + end)
            connection.ends()
        await asyncio.sleep(0.01)
    else:
        scene.exchange.end(GatewayError("enough"))
    scene.check_end()


async def test_an_overloaded_engine_that_should_go_on_with_a_stream_is_left_for_another() -> None:
    scene = Scene(some_endpoints(3, engine="llamacpp"), a_call({"temperature": 0}))
    await scene.begin()
    scene.connection.begins()
    scene.connection.says(an_event("a"))
    scene.connection.breaks()
    await settle()

    scene.connection.answers(503, b'{"error":{"message":"busy"}}')
    await asyncio.sleep(0.15)

    scene.connection.begins()
    scene.connection.says(an_event("b", "stop") + DONE)
    scene.connection.ends()
    assert text_of(scene.client.body) == "ab"
    assert scene.client.error is None
    scene.check_end()


async def test_engines_that_only_begin_to_go_on_do_not_use_up_a_streams_migrations() -> None:
    table = some_endpoints(2, engine="llamacpp")
    scene = Scene(
        table, a_call(), limits={"max_migrations": 1, "suspect_s": 0, "breaker_failures": 9}
    )
    await scene.begin()
    scene.connection.begins()
    scene.connection.says(an_event("a"))
    scene.connection.breaks()
    await settle()
    for _ in range(3):
        scene.connection.begins()
        scene.connection.breaks()
        await asyncio.sleep(0.5)

    scene.connection.begins()
    scene.connection.says(an_event("b", "stop") + DONE)
    scene.connection.ends()

    assert text_of(scene.client.body) == "ab"
    assert scene.exchange.record.migrations == 1
    scene.check_end()


async def test_silence_before_an_engine_was_asked_is_not_held_against_it() -> None:
    scene = Scene(some_endpoints(2, engine="llamacpp"), a_call())
    await scene.begin()
    scene.connection.begins()
    scene.connection.says(an_event("a"))
    relay = scene.exchange._relay
    assert relay is not None
    relay.last_at -= 60
    scene.connection.breaks()
    await settle()
    second = scene.connection

    scene.exchange.check(asyncio.get_running_loop().time())

    assert second.is_open
    scene.exchange.client_left()
    scene.check_end()


async def test_a_stream_that_ends_before_its_text_does_goes_on_elsewhere() -> None:
    """As when an engine dies behind a proxy that ends the answer for it."""
    scene = Scene(some_endpoints(2, engine="llamacpp"), a_call())
    await scene.begin()
    scene.connection.begins()
    scene.connection.says(an_event("a"))
    scene.connection.ends()
    await settle()

    scene.connection.begins()
    scene.connection.says(an_event("b", "stop") + DONE)
    scene.connection.ends()

    assert text_of(scene.client.body) == "ab"
    scene.check_end()
