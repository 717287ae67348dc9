"""The simulated engine: vLLM's HTTP API without weights, at the speed that was predicted.

    python -m cluster.engines.sim_server --model NAME --port P --kv-cache-tokens N ...

Runs anywhere and starts in half a second, for load tests, CI and drills of everything around
engines. Not simulated: prefix caching, tool calls, structured output, logprobs, images.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import uvloop
from aiohttp import web

from cluster.engines.sim_api import (
    Answer,
    ChatRequest,
    CompletionRequest,
    RequestRefused,
    TokenizeRequest,
    error_body,
    generation_of,
    parse,
    prompt_of,
    usage_of,
)
from cluster.engines.sim_batch import Batch, Delta, Generation, Limits, Timing
from cluster.engines.sim_metrics import Metrics
from cluster.engines.sim_text import token_ids

logger = logging.getLogger(__name__)

NumberT = TypeVar("NumberT", int, float)

_MAX_BODY_BYTES = 64 * 2**20
_MAX_LAG_S = 0.1  # how far behind its own timetable the engine tries to catch up
_BACKLOG = 2048  # as uvicorn; with fewer a burst of new connections waits for SYN retries


@dataclass(frozen=True, slots=True)
class Settings:
    """What is served, and how fast. `speed` divides all times."""

    model: str
    limits: Limits
    timing: Timing
    speed: float = 1.0
    api_key: str = ""


class SimulatedEngine:
    """The batch, the clock that drives it, and the HTTP handlers that feed it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._batch = Batch(settings.limits, settings.timing)
        self._metrics = Metrics(settings.model, self._batch)
        self._answers: dict[Generation, asyncio.Queue[Delta]] = {}
        self._work = asyncio.Event()

    async def run(self) -> None:
        """Step for ever.

        Steps end on a timetable, so that late timers (and uvloop's have whole milliseconds) do not
        add up.
        """
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            step = self._batch.schedule()
            if step is None:
                self._work.clear()
                await self._work.wait()
                due_s = loop.time()
                continue
            due_s = max(due_s, loop.time() - _MAX_LAG_S) + step.duration_s / self._settings.speed
            await asyncio.sleep(due_s - loop.time())
            deltas = self._batch.finish(step)
            self._metrics.generation_tokens.inc(len(deltas))
            for generation, delta in deltas:
                self._answers[generation].put_nowait(delta)

    def application(self) -> web.Application:
        """Routes. Handlers must be cancelled when their client leaves (`handler_cancellation`)."""
        app = web.Application(
            client_max_size=_MAX_BODY_BYTES, middlewares=[self._refusals, self._authentication]
        )
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._scrape)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = parse(await request.read(), ChatRequest, served=self._settings.model)
        return await self._generate(request, body)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = parse(await request.read(), CompletionRequest, served=self._settings.model)
        return await self._generate(request, body)

    async def _generate(
        self, request: web.Request, body: ChatRequest | CompletionRequest
    ) -> web.StreamResponse:
        generation = generation_of(body, self._settings.limits)
        answer = Answer(chat=isinstance(body, ChatRequest), model=self._settings.model)
        self._answers[generation] = asyncio.Queue()
        self._batch.add(generation)
        self._work.set()
        try:
            if not body.stream:
                return await self._whole(generation, answer)
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return await self._stream(request, generation, answer, with_usage=with_usage)
        finally:  # also when the client has left: then the handler is cancelled
            del self._answers[generation]
            self._batch.remove(generation)

    async def _whole(self, generation: Generation, answer: Answer) -> web.Response:
        delta = await self._first(generation)
        pieces = [delta.text]
        while delta.finish_reason is None:
            delta = await self._answers[generation].get()
            pieces.append(delta.text)
        usage = usage_of(generation)
        return web.json_response(answer.whole("".join(pieces), delta.finish_reason, usage))

    async def _stream(
        self, request: web.Request, generation: Generation, answer: Answer, *, with_usage: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        delta = await self._first(generation)
        if answer.chat:
            await response.write(answer.opening())
        while True:
            if delta.text or delta.finish_reason:
                await response.write(answer.chunk(*delta))
            if delta.finish_reason:
                break
            delta = await self._answers[generation].get()
        await response.write(answer.closing(usage_of(generation) if with_usage else None))
        await response.write_eof()
        return response

    async def _first(self, generation: Generation) -> Delta:
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        delta = await self._answers[generation].get()
        self._metrics.time_to_first_token.observe(loop.time() - arrived_s)
        self._metrics.prompt_tokens.inc(generation.prompt_tokens)
        return delta

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = parse(await request.read(), TokenizeRequest, served=self._settings.model)
        tokens = token_ids(prompt_of(body))
        max_model_len = self._settings.limits.max_model_len
        return web.json_response(
            {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens}
        )

    async def _models(self, _: web.Request) -> web.Response:
        model = {
            "id": self._settings.model,
            "object": "model",
            "created": 0,
            "owned_by": "bora-sim",
            "root": self._settings.model,
            "parent": None,
            "max_model_len": self._settings.limits.max_model_len,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "bora-sim"})

    async def _scrape(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), content_type="text/plain", charset="utf-8")

    @web.middleware
    async def _refusals(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestRefused as error:
            return web.json_response(error.body, status=error.status)
        except web.HTTPException as error:  # aiohttp's own: no such path, body too large
            what = f"{request.method} {request.path}: {error.reason}"
            return web.json_response(error_body(what, error.status), status=error.status)
        except web.RequestPayloadError as error:  # a body not encoded as its header says
            refused = RequestRefused(f"There was an error parsing the body: {error}")
            return web.json_response(refused.body, status=refused.status)

    @web.middleware
    async def _authentication(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        key = self._settings.api_key
        given = request.headers.get("Authorization", "")
        if key and request.path.startswith("/v1") and given != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, which end the process at once."""
    options = _options(arguments)
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s"
    )
    limits = Limits(
        options.max_num_seqs,
        options.max_num_batched_tokens,
        options.kv_cache_tokens,
        options.max_model_len,
    )
    timing = Timing(
        options.prefill_tokens_per_s,
        options.tpot_ms,
        max(options.tpot_ms, options.tpot_ms_at_max),
        options.max_num_seqs,
    )
    api_key = os.environ.get("VLLM_API_KEY", "")
    settings = Settings(options.model, limits, timing, options.speed, api_key)
    uvloop.run(_serve(settings, options))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.engines.sim_server",
        description="OpenAI-compatible server without weights. VLLM_API_KEY: the key it asks for.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="the name that requests give")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="0: any free one; the log tells")
    add("--max-model-len", type=_positive(int), default=32768, help="context, tokens")
    add("--max-num-seqs", type=_positive(int), default=256, help="requests that run at once")
    add("--max-num-batched-tokens", type=_positive(int), default=8192, help="of one step")
    add("--kv-cache-tokens", type=_positive(int), default=262144, help="KV cache, tokens")
    add("--weights-bytes", type=_positive(int), default=2**30, help="of one rank; only logged")
    add("--prefill-tokens-per-s", type=_positive(float), default=20000.0, help="prompt speed")
    add("--tpot-ms", type=_positive(float), default=10.0, help="step time with one request")
    add("--tpot-ms-at-max", type=float, default=30.0, help="step time with max-num-seqs requests")
    add("--speed", type=_positive(float), default=1.0, help="divides prefill and decode times")
    add("--start-delay-s", type=float, default=0.0, help="simulated load time, before listening")
    add("--fail-after-s", type=float, help="drill: exit with status 1 so long after the start")
    options = parser.parse_args(arguments)
    if options.kv_cache_tokens < options.max_model_len:
        parser.error(
            f"the KV cache ({options.kv_cache_tokens} tokens) must hold one request of "
            f"--max-model-len ({options.max_model_len} tokens): lower it"
        )
    return options


def _positive(number: type[NumberT]) -> Callable[[str], NumberT]:
    def positive(text: str) -> NumberT:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    return positive


async def _serve(settings: Settings, options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, os._exit, 0)
    if options.fail_after_s is not None:
        loop.call_later(options.fail_after_s, _fail)
    # Lines as vLLM writes them, so that one parser reads both.
    logger.info("Starting to load model %s (simulated)", settings.model)
    await asyncio.sleep(options.start_delay_s)
    gib = options.weights_bytes / 2**30
    logger.info("Model loading took %.2f GiB memory and %.6f seconds", gib, options.start_delay_s)
    limits = settings.limits
    logger.info(
        "GPU KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx",
        f"{limits.kv_cache_tokens:,}",
        f"{limits.max_model_len:,}",
        limits.kv_cache_tokens / limits.max_model_len,
    )
    engine = SimulatedEngine(settings)
    runner = web.AppRunner(engine.application(), handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, options.host, options.port, backlog=_BACKLOG).start()
    host, port = runner.addresses[0][:2]
    logger.info("Application startup complete: http://%s:%d", host, port)
    await engine.run()


def _fail() -> None:
    logger.error("simulated failure (--fail-after-s)")
    os._exit(1)


if __name__ == "__main__":
    main()
