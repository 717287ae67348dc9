"""A model whose engines are llama.cpp looks to clients like one that vLLM serves."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.call import Call
from gateway.llamacpp_dialect import asked, told
from tests.gateway.exchanges import (
    DONE,
    Scene,
    a_call,
    an_event,
    settle,
    some_endpoints,
    text_of,
)

TEXT = "/v1/completions"


def an_error(message: str, code: int = 500) -> bytes:
    error = {"code": code, "message": message, "type": "server_error"}
    return json.dumps({"error": error}).encode()


def a_request(path: str, **body: Any) -> Call:
    return a_call(json.dumps({"model": "chat", **body}).encode(), path)


async def a_scene(call: Call, replicas: int = 1, engine: str = "llamacpp") -> Scene:
    scene = Scene(some_endpoints(replicas, engine=engine), call)
    await scene.begin()
    return scene


@pytest.mark.parametrize(
    ("given", "max_tokens"),
    [
        ({}, 16),
        ({"max_tokens": 3}, 3),
        ({"max_tokens": None}, None),  # as vLLM: to the end of the context
    ],
)
async def test_a_completion_has_openais_16_tokens_if_the_client_names_no_number(
    given: dict[str, Any], max_tokens: int | None
) -> None:
    scene = await a_scene(a_request(TEXT, prompt="x", **given))

    assert scene.connection.asked["max_tokens"] == max_tokens
    scene.exchange.client_left()


async def test_chats_and_other_engines_are_asked_what_the_client_asks() -> None:
    chat, text = a_request("/v1/chat/completions", messages=[]), a_request(TEXT, prompt="x")

    for scene in (await a_scene(chat), await a_scene(text, engine="vllm")):
        assert "max_tokens" not in scene.connection.asked
        scene.exchange.client_left()


@pytest.mark.parametrize(
    ("body", "path", "wanted"),
    [
        (
            {"prompt": "x"},
            "/tokenize",
            {"content": "x", "add_special": True, "with_pieces": False},
        ),
        (
            {"prompt": "x", "add_special_tokens": False},
            "/tokenize",
            {"content": "x", "add_special": False, "with_pieces": False},
        ),
        ({"content": "x"}, "/tokenize", {"content": "x"}),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "/v1/chat/completions/input_tokens",
            {"messages": [{"role": "user", "content": "x"}]},
        ),
    ],
)
def test_text_to_count_is_asked_for_in_its_words(
    body: dict[str, Any], path: str, wanted: dict[str, Any]
) -> None:
    to, what = asked("/tokenize", json.dumps({"model": "chat", **body}).encode())

    assert to == path
    assert wanted.items() <= json.loads(what).items()


@pytest.mark.parametrize(
    ("path", "said", "expected"),
    [
        (
            "/tokenize",
            {"tokens": [5, 6]},
            {"count": 2, "max_model_len": 2048, "tokens": [5, 6]},
        ),
        ("/tokenize", {"input_tokens": 9}, {"count": 9, "max_model_len": 2048, "tokens": None}),
        ("/detokenize", {"content": "wind"}, {"prompt": "wind", "content": "wind"}),
    ],
)
def test_tokens_are_told_in_vllms_words(
    path: str, said: dict[str, Any], expected: dict[str, Any]
) -> None:
    status, body = told(path, 200, json.dumps(said).encode(), 2048)

    assert (status, json.loads(body)) == (200, expected)


async def test_mistakes_that_it_tells_as_its_own_failures_do_not_take_it_out_of_service() -> None:
    message = "image input is not supported"
    for _ in range(4):
        scene = await a_scene(a_call({"stream": False}), replicas=2)
        scene.connection.answers(500, an_error(message))
        await settle()

        assert scene.client.status == 400
        error = json.loads(scene.client.body)["error"]
        assert (error["message"], error["type"]) == (message, "invalid_request_error")
        assert len(scene.engines.made) == 1, "asked once"
        [states] = [scene.plant.admission.router.snapshot(0.0)]
        assert {each.breaker for each in states} == {"closed"}
        scene.check_end()


@pytest.mark.parametrize("message", ["Compute error.", "Invalid input batch."])
async def test_failures_of_its_own_are_tried_elsewhere(message: str) -> None:
    scene = await a_scene(a_call({"stream": False}), replicas=2)

    scene.connection.answers(500, an_error(message))
    await settle()

    assert len(scene.engines.made) == 2
    scene.connection.answers(200)
    scene.check_end()


async def test_what_does_not_fit_into_its_cache_now_is_no_failure_but_too_much_at_once() -> None:
    scene = await a_scene(a_call({"stream": False}))

    scene.connection.answers(500, an_error("Context size has been exceeded."))

    assert scene.client.status == 503
    scene.check_end()


async def test_streams_that_its_cache_has_no_room_for_go_on_elsewhere_and_it_is_not_blamed() -> (
    None
):
    """It ends all that it runs when its cache is full, where vLLM lets some wait."""
    scene = await a_scene(a_call({}), replicas=2)
    assert scene.exchange._upstream.lease is not None
    left = scene.exchange._upstream.lease.state
    scene.connection.begins()
    scene.connection.says(an_event("The bora "))
    scene.connection.says(b"data: " + an_error("Context size has been exceeded.") + b"\n\n")
    await settle()

    scene.connection.begins()
    scene.connection.says(an_event("blows", "stop") + DONE)
    scene.connection.ends()

    assert text_of(scene.client.body) == "The bora blows"
    assert left.suspect_until < 0 < left.busy_until
    scene.check_end()


async def test_tokens_of_a_stream_with_a_stop_string_are_counted_as_they_come() -> None:
    """vLLM holds back as many characters as a stop string has; llama.cpp does not."""
    scene = await a_scene(a_call({"max_tokens": 20, "stop": ["abcdef"]}), replicas=2)
    scene.connection.begins()
    for letter in "The bora b":
        scene.connection.says(an_event(letter))
    scene.connection.breaks()
    await settle()

    assert scene.connection.asked["max_tokens"] == 10
    scene.connection.begins()
    scene.connection.says(an_event("lows", "stop") + DONE)
    scene.connection.ends()
    assert text_of(scene.client.body) == "The bora blows"
    scene.check_end()


async def test_who_asks_for_more_memory_than_others_can_spare_is_refused() -> None:
    for name in ("repeat_last_n", "dry_penalty_last_n"):
        scene = await a_scene(a_call({name: 2_000_000_000}))

        assert scene.client.error is not None
        assert (scene.client.error.status, scene.client.error.param) == (400, name)
        scene.check_end()


async def test_an_event_without_anything_in_it_is_no_failure() -> None:
    """As before the answers to several prompts."""
    scene = await a_scene(a_call({"prompt": ["a", "b"]}, TEXT))
    scene.connection.begins()
    scene.connection.says(b"data: null\n\n")
    scene.connection.says(an_event("wind", "stop") + DONE)
    scene.connection.ends()

    assert scene.client.error is None
    assert b"null\n" not in scene.client.body
    assert text_of(scene.client.body) == "wind"
    scene.check_end()


async def test_vectors_from_an_engine_that_makes_none_are_told_as_not_supported() -> None:
    scene = await a_scene(a_request("/v1/embeddings", input="x"))
    scene.connection.answers(501, an_error("This server does not support embeddings", 501))

    assert scene.client.error is not None
    assert scene.client.error.code == "endpoint_not_supported"
    scene.check_end()
