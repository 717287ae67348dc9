"""The prefill leg: one engine reads a prompt, the engine that answers fetches its KV cache from there.

    a place at a decode endpoint, as for any request
    -> a prefill endpoint: the request with `max_tokens` 1; it keeps the cache, and says where
    -> the decode endpoint: the request with these `kv_transfer_params`

Whatever goes wrong on the way costs time and nothing else: the decode engine reads the prompt itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.answer import Answer
from gateway.call import Call, parse_object
from gateway.continuation import CHAT_PATH, can_be_continued
from gateway.engine import request_head
from gateway.engine_connection import EngineConnection
from gateway.engine_request import engine_request
from gateway.errors import BadRequest, EngineBroke, GatewayError
from gateway.plant import Plant
from gateway.prediction import BYTES_PER_TOKEN
from gateway.record import Record
from gateway.reply import one_of_ours
from gateway.routing import Lease

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_PARAMS = "kv_transfer_params"
_SLOWEST_TOKENS_PER_S = 1000.0  # at which a prefill engine is still waited for
_LOOK_S = 1.0  # at whether health checks have found it dead meanwhile
# Of a name that stands twice in a body the last counts: these end the body. The params are vLLM's.
_READ_ONLY = (
    b',"stream":false,"stream_options":null,"max_tokens":1,"min_tokens":0,%b"kv_transfer_params":'
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}}'
)


class _Asked(msgspec.Struct):
    """What of a body decides whether another engine may read its prompt."""

    n: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    echo: Any = None
    prompt_logprobs: Any = None
    prompt: Any = None
    kv_transfer_params: Any = None


class _Params(msgspec.Struct):
    """What the answer must tell: a vLLM that is given less ends (0.32, an assertion)."""

    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    remote_block_ids: list[Any]
    do_remote_prefill: bool = False


class _Read(msgspec.Struct):
    kv_transfer_params: msgspec.Raw


_asked = msgspec.json.Decoder(_Asked)
_read = msgspec.json.Decoder(_Read)
_params = msgspec.json.Decoder(_Params)


@dataclass(frozen=True, slots=True)
class _WithCache:
    """The client's request, and where the KV cache of its prompt is."""

    path: str
    body: bytes

    def request(self, served_model_name: str, *, by_ids: bool) -> tuple[str, bytes]:  # noqa: ARG002
        return self.path, self.body


class _Heard:
    """Waits for a whole JSON answer (see `Listener`)."""

    def __init__(self, name: str) -> None:
        self.answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self.is_stale = False
        self._name = name

    def answered(self, answer: Answer, body: bytes) -> None:
        self.answer.set_result((answer.status, body))

    def began(self, answer: Answer) -> None:
        pass

    def received(self, data: bytes) -> None:
        pass

    def ended(self) -> None:
        self.broke(
            EngineBroke(f"the engine at {self._name} answered with something else than JSON")
        )

    def stale(self) -> None:
        self.is_stale = True
        self.answer.set_result((0, b""))

    def broke(self, error: EngineBroke) -> None:
        self.answer.set_exception(error)


class PrefillLeg:
    """Of `call`, before it goes to `writer`, the place that answers it. `span` is the request's."""

    __slots__ = ("_asked", "_call", "_plant", "_record", "_span", "_writer")

    def __init__(
        self,
        plant: Plant,
        call: Call,
        asked: _Asked,
        *,
        writer: Lease,
        record: Record,
        span: Span | None,
    ) -> None:
        self._plant, self._call, self._asked, self._writer = plant, call, asked, writer
        self._record, self._span = record, span

    async def run(self) -> None:
        """Have the prompt read, if that pays; `writer` knows of it then. Cancelling hangs up.

        Raises:
            BadRequest: the client gives params of its own. They name addresses that an engine would
                fetch from, and cache of others that it would answer from.
        """
        if self._asked.kv_transfer_params is not None:
            raise BadRequest(f"`{_PARAMS}` is the gateway's to set for this model", param=_PARAMS)
        admission, started = self._plant.admission, time.monotonic()
        least = admission.limits.prefill_min_tokens
        reader = admission.router.reserve_to_read(
            self._writer, self._call, least_tokens=least, now=started
        )
        if reader is None:
            return
        step, call = None, self._call
        if self._span is not None:
            step, call = self._plant.tracing.step(self._span, "prefill", call)
        outcome = "cancelled"
        try:
            outcome = await self._hand_over(reader, call)
        except BadRequest:  # of what is wrong with it the client hears from the writer
            outcome = "refused"
        except GatewayError as error:
            admission.failed(reader, error)
            outcome = "failed"
        finally:
            admission.router.release(reader, now=time.monotonic())
            self._plant.meter.prefilled(reader.endpoint, outcome, time.monotonic() - started)
            if step is not None:
                step.set_attribute("bora.endpoint", reader.endpoint.key)
                step.set_attribute("bora.outcome", outcome)
                step.end()

    async def _hand_over(self, reader: Lease, call: Call) -> str:
        """What came of it, as the metrics name it.

        Raises:
            BadRequest: nobody can read the client's body.
            GatewayError: the engine cannot be reached, broke off, or takes too long.
        """
        status, body = await self._answer(reader, call)
        admission, writer = self._plant.admission, self._writer
        if status != HTTPStatus.OK:
            admission.failed(reader, status)
            return "refused"
        admission.router.prompt_read(reader, writer, now=time.monotonic())
        params = _params_of(body)
        if params is None:
            return "kept_nothing"
        _, asked = engine_request(self._call, writer)
        writer.rewrite = _WithCache(self._call.path, with_params(asked, params))
        self._record.more_headers += one_of_ours("prefill-endpoint", reader.endpoint.key)
        return "handed_over"

    async def _answer(self, reader: Lease, call: Call) -> tuple[int, bytes]:
        """The engine's status and body. Raises as `_hand_over`."""
        engines, endpoint = self._plant.engines, reader.endpoint
        body = read_only(call, call.body_at(endpoint))
        patience_s = self._plant.admission.limits.stall_timeout_s
        patience_s += (reader.prompt_tokens or 0) / _SLOWEST_TOKENS_PER_S
        deadline = time.monotonic() + patience_s
        connection = engines.take(endpoint) or await engines.connect(endpoint)
        heard = await _ask(connection, reader, call, body, deadline)
        if heard.is_stale:
            heard = await _ask(await engines.connect(endpoint), reader, call, body, deadline)
        return heard.answer.result()


async def _ask(
    connection: EngineConnection, reader: Lease, call: Call, body: bytes, deadline: float
) -> _Heard:
    endpoint = reader.endpoint
    heard = _Heard(endpoint.key)
    try:
        connection.ask(request_head(endpoint, call, call.path, len(body)), body, heard)
        while not heard.answer.done():
            left = deadline - time.monotonic()
            if left <= 0 or reader.state.dead:
                raise EngineBroke(f"the engine at {endpoint.key} does not finish reading")
            await asyncio.wait((heard.answer,), timeout=min(left, _LOOK_S))
    finally:
        if not heard.answer.done():
            connection.abort()
        elif not heard.answer.cancelled():
            heard.answer.exception()  # looked at, also where nobody asks for it any more
    return heard


def prefill_leg(
    plant: Plant, call: Call, writer: Lease, record: Record, span: Span | None
) -> PrefillLeg | None:
    """The leg that `call` takes before it goes to `writer`; None: it goes there at once."""
    asked = _asked_of(call)
    if asked is None:
        return None
    if asked.kv_transfer_params is None:
        if writer.endpoint.role != "decode" or record.attempts:
            return None
        is_short = len(call.body) < BYTES_PER_TOKEN * plant.admission.limits.prefill_min_tokens
        if is_short or not can_be_continued(call.path) or not _reads_once(asked):
            return None
    return PrefillLeg(plant, call, asked, writer=writer, record=record, span=span)


def with_params(body: bytes, params: bytes) -> bytes:
    """`body` for an engine that is to fetch the KV cache that `params` tell of."""
    return b'%b,"kv_transfer_params":%b}' % (body.rstrip()[:-1], params)


def read_only(call: Call, body: bytes) -> bytes:
    """`body` for an engine that is to read its prompt and keep the KV cache."""
    more = b'"max_completion_tokens":1,' if call.path == CHAT_PATH else b""
    return body.rstrip()[:-1] + _READ_ONLY % more


def _asked_of(call: Call) -> _Asked | None:
    if not call.body:
        return None
    try:
        return _asked.decode(call.body)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        pass
    try:  # what msgspec does not take, as a lone surrogate, an engine may
        value = parse_object(call.body)
    except BadRequest:
        return None  # nobody can read it
    return _Asked(**{name: value[name] for name in _Asked.__struct_fields__ if name in value})


def _reads_once(asked: _Asked) -> bool:
    """Whether there is one prompt, read for one answer, and none of its tokens are told.

    Tokens of prompts that are told (`echo`, `prompt_logprobs`) are computed, not fetched.
    """
    prompt = asked.prompt
    several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
    told = asked.echo or asked.prompt_logprobs is not None
    many = (asked.n or 1) != 1 or (asked.best_of or 1) != 1 or asked.use_beam_search
    return not (several or told or many)


def _params_of(body: bytes) -> bytes | None:
    """The params in an engine's answer, as they stand there; None: it kept no cache."""
    try:
        raw = bytes(_read.decode(body).kv_transfer_params)
        params = _params.decode(raw)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return raw if params.do_remote_prefill and params.remote_block_ids else None
