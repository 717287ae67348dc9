"""Whatever a client, engines and the gateway do in whatever order, a call ends once and leaves nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.endpoints import ServedModel
from gateway.plant import shutting_down
from tests.gateway.engines import a_table, an_endpoint
from tests.gateway.exchanges import DONE, FakeConnection, Scene, a_call, an_event, settle
from tests.gateway.virtual_time import run_in_virtual_time

ERROR = b'data: {"error":{"message":"no memory","code":500}}\n\n'
LIMITS = {"heartbeat_s": 3.0, "queue_timeout_s": 8.0, "replacement_timeout_s": 5.0}
LIMITS |= {"prefill_min_tokens": 1}
READ = json.dumps(
    {
        "kv_transfer_params": {
            "do_remote_prefill": True,
            "remote_block_ids": [[1]],
            "remote_engine_id": "e",
            "remote_request_id": "r",
            "remote_host": "p",
            "remote_port": 2,
        }
    }
).encode()
LIMITS |= {"max_attempts": 3, "max_migrations": 2, "hold_timeout_s": 20.0}


class Story:
    """A scene in which one thing after another happens. `split`: prompts are read elsewhere."""

    def __init__(self, *, stream: bool, managed: bool, split: bool) -> None:
        models = (
            ServedModel(name="chat", fallback=("small",), scalable=managed, managed=managed),
            ServedModel(name="small"),
        )
        role = "decode" if split else "whole"
        endpoints = [
            an_endpoint("http://a:1", id="a", engine="vllm", served_model_name="one", role=role),
            an_endpoint("http://b:1", id="b", engine="llamacpp", max_in_flight=1, role=role),
            an_endpoint("http://c:1", id="c", model="small"),
        ]
        if split:
            endpoints.append(an_endpoint("http://p:1", id="p", engine="vllm", role="prefill"))
        table = a_table(*endpoints, models=models)
        self.most_in_flight = 2 if split else 1
        self.scene = Scene(table, a_call({"stream": stream}, timeout_s=60.0), limits=LIMITS)
        self.scene.engines.pooled = {"a"}
        self.is_slow = False
        # What engines said so far on each connection, so that they follow HTTP.
        self.began: set[FakeConnection] = set()

    def _speaking(self) -> FakeConnection | None:
        made = self.scene.engines.made
        connection = made[-1] if made and made[-1].is_open else None
        if connection is not None and connection.listener and connection not in self.began:
            self.began.add(connection)
            connection.begins()
        return connection if connection and connection.is_open else None

    def _says(self, data: bytes) -> None:
        connection = self._speaking()
        if connection:
            connection.says(data)

    def _answers(self, status: int) -> None:
        made = self.scene.engines.made
        if made and made[-1].is_open and made[-1] not in self.began:
            made[-1].answers(status, json.dumps({"model": "one"}).encode())

    def _newest(self) -> FakeConnection | None:
        made = self.scene.engines.made
        return made[-1] if made and made[-1].is_open else None

    def event(self) -> None:
        self._says(an_event("x"))

    def half_an_event(self) -> None:
        self._says(an_event("x")[:20])

    def last_event(self) -> None:
        self._says(an_event("x", "stop"))

    def done(self) -> None:
        self._says(DONE)

    def error_event(self) -> None:
        self._says(ERROR)

    def garbage(self) -> None:
        self._says(b"data: {nonsense\n\n")

    def end_of_answer(self) -> None:
        connection = self._speaking()
        if connection:
            connection.ends()

    def head_only(self) -> None:
        self._speaking()

    def plain_answer(self) -> None:
        connection = self._newest()
        if connection and connection not in self.began:
            self.began.add(connection)
            connection.begins(200, [])
            connection.says(b"plain")

    def empty_503(self) -> None:
        connection = self._newest()
        if connection and connection not in self.began:
            self.began.add(connection)
            connection.begins(503, [])
            connection.ends()

    def json_200(self) -> None:
        self._answers(200)

    def prompt_is_read(self) -> None:
        newest = self._newest()
        if newest and newest.endpoint.key == "p" and newest not in self.began:
            newest.answers(200, READ)

    def json_400(self) -> None:
        self._answers(400)

    def json_500(self) -> None:
        self._answers(500)

    def json_503(self) -> None:
        self._answers(503)

    def engine_breaks(self) -> None:
        connection = self._newest()
        if connection:
            connection.breaks()

    def stale(self) -> None:
        connection = self._newest()
        if connection and connection not in self.began:
            connection.is_stale()

    def all_engines_go(self) -> None:
        self.scene.engines.down = {"a", "b", "c", "p"}

    def all_engines_come(self) -> None:
        self.scene.engines.down = set()

    def health_death(self) -> None:
        for key in "abc":
            if self.scene.exchange.is_at(key):
                self.scene.exchange.give_up("it does not answer its health checks")

    def endpoint_dies(self) -> None:
        self.scene.plant.admission.router.check_failed("http://a:1", now=0.0, enough=1)
        self.health_death()

    def prefill_endpoint_dies(self) -> None:
        self.scene.plant.admission.router.check_failed("http://p:1", now=0.0, enough=1)

    def stall(self) -> None:
        self.scene.exchange.check(time.monotonic() + 1000)

    def client_leaves(self) -> None:
        self.scene.exchange.client_left()

    def client_slows(self) -> None:
        if not self.is_slow:
            self.is_slow = True
            self.scene.exchange.pause()

    def client_speeds_up(self) -> None:
        if self.is_slow:
            self.is_slow = False
            self.scene.exchange.resume()

    def drain_begins(self) -> None:
        self.scene.plant.draining = True

    def drain_ends(self) -> None:
        self.scene.plant.draining = True
        self.scene.exchange.end(shutting_down())

    def model_goes(self) -> None:
        table = self.scene.plant.admission.table
        assert table is not None
        rest = [each for each in table.endpoints if each.model != "chat"]
        self.scene.plant.admission.apply(a_table(*rest, version=table.version + 1))

    def check(self) -> None:
        """What must hold at any time."""
        scene = self.scene
        open_ones = [each for each in scene.engines.made if each.is_open]
        assert len(open_ones) <= 1
        assert scene.in_flight <= self.most_in_flight
        if self.is_slow and open_ones and open_ones[0].listener:
            assert open_ones[0].paused or open_ones[0].endpoint.role == "prefill"
        over = scene.exchange not in scene.plant.running
        assert over == (scene.client.state == "over" or scene.exchange.record.status == 499)
        if over:
            scene.check_end()


PASSING = {"a_moment": 0.0, "a_second": 1.0, "a_while": 6.0, "a_minute": 70.0}
HAPPENINGS: list[Callable[[Story], None]] = [
    value for name, value in vars(Story).items() if name[0] != "_" and name != "check"
]


async def _play(story: list[str], *, stream: bool, managed: bool, split: bool) -> None:
    scene = Story(stream=stream, managed=managed, split=split)
    scene.scene.exchange.begin()
    scene.check()
    for name in story:
        if name in PASSING:
            await asyncio.sleep(PASSING[name])
            await settle()
        else:
            getattr(scene, name)()
        if name != "a_moment":
            await asyncio.sleep(0)
        scene.check()
    await asyncio.sleep(100.0)  # its deadline
    scene.check()
    assert scene.scene.exchange not in scene.scene.plant.running
    scene.scene.check_end()


NAMES = [each.__name__ for each in HAPPENINGS] + list(PASSING)
LIKELY = ["a_moment", "event", "engine_breaks", "head_only"]


@given(
    story=st.lists(st.sampled_from(NAMES + LIKELY * 3), max_size=30),
    stream=st.booleans(),
    managed=st.booleans(),
)
@example(
    story=["a_moment", "stale", "client_slows", "a_moment", "event"], stream=True, managed=False
)
@example(story=["all_engines_go", "stale", "a_while", "model_goes"], stream=True, managed=True)
@settings(max_examples=400, deadline=None)
def test_a_call_ends_once_whatever_happens(story: list[str], stream: bool, managed: bool) -> None:
    run_in_virtual_time(_play(story, stream=stream, managed=managed, split=False))


@given(
    story=st.lists(
        st.sampled_from(NAMES + [*LIKELY, "prompt_is_read", "prompt_is_read"] * 3), max_size=30
    ),
    stream=st.booleans(),
    managed=st.booleans(),
)
@example(story=["a_moment", "prefill_endpoint_dies", "a_while"], stream=True, managed=True)
@example(
    story=["a_moment", "prompt_is_read", "a_moment", "event", "engine_breaks", "a_moment"],
    stream=True,
    managed=False,
)
@settings(max_examples=300, deadline=None)
def test_a_call_whose_prompt_is_read_elsewhere_ends_once_too(
    story: list[str], stream: bool, managed: bool
) -> None:
    run_in_virtual_time(_play(story, stream=stream, managed=managed, split=True))
