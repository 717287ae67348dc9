"""Chat users against a gateway: `locust -f loadtests/locustfile.py --headless -u 16 -r 4 -t 30s`.

Beside each whole request, locust's report has a row `TTFT` (one entry for each stream) and a row
`ITL` (one for each further token).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import gevent
from locust import FastHttpUser, between, events
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, ResponseContextManager

from loadtests.sse import EventReader, StreamRecord, answer_failure

SENTENCES = (
    "The bora falls from the plateau to the sea and clears the sky within an hour.",
    "A harbour master writes down each ship, its flag, its draught and its last port.",
    "Explain to a new colleague why the queue grows although no machine is busy.",
    "Two trains leave at noon, one stops in every village and one does not stop at all.",
    "The recipe asks for flour, two eggs, a little milk and more patience than time.",
    "List what could go wrong when a clock on one of three servers runs backwards.",
    "Old maps show the island north of the strait, newer ones do not show it.",
    "A library lends books, and also a ladder, a sewing machine and a telescope.",
    "Say in plain words what a cache is good for and when it does harm.",
    "The committee met on Tuesday, agreed on nothing and thanked everybody for it.",
    "Compare three ways to cross a river without a bridge and name the cheapest.",
    "Her notebook held weather, prices, the names of dogs and one unfinished poem.",
)

RETRY_S = 1.0


def add_options(parser: LocustArgumentParser, **_: Any) -> None:
    """Our own options; every one has a default and an environment variable."""
    add = parser.add_argument
    add("--model", default="", env_var="BORA_LOAD_MODEL", help="Only this model; default: all")
    add("--max-tokens", type=int, default=64, env_var="BORA_LOAD_MAX_TOKENS", help="Of an answer")
    add("--prompt-words", type=int, default=60, env_var="BORA_LOAD_PROMPT_WORDS", help="Words")
    add(
        "--stream-share", type=float, default=0.8, env_var="BORA_LOAD_STREAM_SHARE",
        help="Share of requests that stream, 0 to 1",
    )  # fmt: skip
    add("--api-key", default="", env_var="BORA_API_KEY", is_secret=True, help="Bearer token")


events.init_command_line_parser.add_listener(add_options)


class ChatUser(FastHttpUser):  # type: ignore[misc] # locust has no types for mypy
    """Asks one thing after another, mostly through chat, with short pauses."""

    host = "http://127.0.0.1:8000"
    wait_time = between(0.1, 0.5)
    network_timeout = 300.0

    def on_start(self) -> None:
        """Find the models; a gateway that has none yet is asked again."""
        options = self.environment.parsed_options
        self.headers = {"Accept-Encoding": "identity"}
        if options.api_key:
            self.headers["Authorization"] = f"Bearer {options.api_key}"
        self.models = [options.model] if options.model else self._list_models()
        while not self.models:
            gevent.sleep(RETRY_S)
            self.models = self._list_models()

    def chat(self) -> None:
        """POST /v1/chat/completions."""
        message = {"role": "user", "content": self._prompt()}
        self._ask("/v1/chat/completions", {"messages": [message]})

    def complete(self) -> None:
        """POST /v1/completions."""
        self._ask("/v1/completions", {"prompt": self._prompt()})

    tasks = {chat: 4, complete: 1}  # noqa: RUF012 - locust's way; the decorator is untyped

    def _list_models(self) -> list[str]:
        with self.client.get("/v1/models", headers=self.headers, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {_excerpt(response)}")
                return []
            models = [model["id"] for model in response.json()["data"]]
            if not models:
                response.failure("the gateway serves no model")
            return models

    def _prompt(self) -> str:
        words: list[str] = []
        while len(words) < self.environment.parsed_options.prompt_words:
            words += random.choice(SENTENCES).split()  # noqa: S311 - no secret
        return " ".join(words[: self.environment.parsed_options.prompt_words])

    def _ask(self, path: str, body: dict[str, Any]) -> None:
        options = self.environment.parsed_options
        stream = random.random() < options.stream_share  # noqa: S311 - no secret
        body |= {
            "model": random.choice(self.models),  # noqa: S311 - no secret
            "max_tokens": options.max_tokens,
            "stream": stream,
        }
        start_s = time.perf_counter()
        with self.client.post(
            path,
            json=body,
            headers=self.headers,
            name=f"{path} (stream)" if stream else path,
            stream=stream,
            catch_response=True,
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {_excerpt(response)}")
            elif stream:
                self._follow(response, path, start_s)
            elif failure := answer_failure(response.content or b""):
                response.failure(failure)

    def _follow(self, response: ResponseContextManager, path: str, start_s: float) -> None:
        record, reader = StreamRecord(start_s), EventReader()
        num_bytes, broken = 0, None
        try:
            for line in _lines(response):
                num_bytes += len(line)
                for event in reader.feed(line):
                    record.observe(event, time.perf_counter())
        except FAILURE_EXCEPTIONS as error:
            broken = f"the connection broke: {error!r}"
        # Until here locust has measured the time to the headers.
        response.request_meta["response_time"] = (time.perf_counter() - start_s) * 1000
        response.request_meta["response_length"] = num_bytes
        failure = broken or record.failure
        if failure:
            response.failure(failure)
        if record.ttft_s is not None:
            self._fire("TTFT", path, record.ttft_s)
        for gap_s in record.itl_s:
            self._fire("ITL", path, gap_s)

    def _fire(self, kind: str, path: str, duration_s: float) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=path,
            response_time=duration_s * 1000,
            response_length=0,
            exception=None,
            context={},
        )


def _lines(response: ResponseContextManager) -> Iterator[bytes]:
    """Lines as they arrive. `iter_content` would wait until a whole block is full."""
    while line := response.stream.readline(b"\n"):
        yield line


def _excerpt(response: ResponseContextManager) -> str:
    return (response.text or str(getattr(response, "error", "")))[:200]
