"""The simulated engine: vLLM's HTTP API without weights, at the speed that was predicted.

    python -m cluster.engines.sim_server --model NAME --port P --kv-cache-tokens N ...

Runs anywhere and starts in half a second, for load tests, CI and drills of everything around
engines. Not simulated: prefix caching, tool calls, structured output, logprobs, images.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import signal
import sys
from collections.abc import Sequence
from uuid import uuid4

import uvloop
from aiohttp import web

from cluster.engines.adapter import EngineLoad
from cluster.engines.sim_adapters import LOAD_PATH, UNLOAD_PATH, Adapters
from cluster.engines.sim_answer import Answer, usage_of
from cluster.engines.sim_api import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestRefused,
    StreamOptions,
    TokenizeRequest,
    generation_of,
    parse,
    prompt_of,
)
from cluster.engines.sim_batch import Batch, Delta, Generation
from cluster.engines.sim_drill import PATH as DRILL_PATH
from cluster.engines.sim_drill import Drill, Fault
from cluster.engines.sim_metrics import Metrics
from cluster.engines.sim_middleware import authentication, faults, refusals
from cluster.engines.sim_options import parse_options
from cluster.engines.sim_settings import Settings, settings_of
from cluster.engines.sim_transfer import KvTransfer
from cluster.engines.sim_vocabulary import NoSuchToken, text_of

LOG_FORMAT = "%(levelname)s %(asctime)s %(message)s"

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 64 * 2**20
_MAX_LAG_S = 0.1  # how far behind its own timetable the engine tries to catch up
_BACKLOG = 2048  # as uvicorn; with fewer a burst of new connections waits for SYN retries


class SimulatedEngine:
    """The batch, the clock that drives it, and the HTTP handlers that feed it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._batch = Batch(settings.limits, settings.timing)
        self._metrics = Metrics(settings.model, self._batch, settings.data_parallel_size)
        self._answers: dict[Generation, asyncio.Queue[Delta]] = {}
        self._work = asyncio.Event()
        self._drill = Drill(settings.fault or Fault())
        self._adapters = Adapters(settings.model, settings.max_lora_rank)
        self._transfer: KvTransfer | None = None
        if settings.transfer is not None:
            self._transfer = KvTransfer(
                settings.transfer, speed=settings.speed, free=self._batch.let_go
            )

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
            step_s = step.duration_s / self._settings.speed * self._drill.slowdown
            begun_s = loop.time()
            due_s = max(due_s, begun_s - _MAX_LAG_S) + step_s
            await asyncio.sleep(due_s - begun_s)
            deltas = self._batch.finish(step)
            self._metrics.generation_tokens.inc(len(deltas))
            self._metrics.intervals(len(step.decodes), loop.time() - begun_s)
            for generation, delta in deltas:
                self._answers[generation].put_nowait(delta)
                if delta.finish_reason and self._transfer:
                    self._transfer.finished(generation)

    def application(self) -> web.Application:
        """Routes. Handlers must be cancelled when their client leaves (`handler_cancellation`)."""
        app = web.Application(
            client_max_size=_MAX_BODY_BYTES,
            middlewares=[refusals, authentication(self._settings.api_key), faults(self._drill)],
        )
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._scrape)
        if self._settings.max_lora_rank:
            app.router.add_post(LOAD_PATH, self._load_adapter)
            app.router.add_post(UNLOAD_PATH, self._unload_adapter)
        if self._transfer is not None:
            app.cleanup_ctx.append(self._transfer.listen)
        if self._settings.fault is not None:
            app.router.add_get(DRILL_PATH, self._drill.get)
            app.router.add_post(DRILL_PATH, self._drill.post)
        return app

    def load(self) -> EngineLoad:
        """What `/metrics` tells."""
        return self._metrics.load()

    def begin(self, generation: Generation) -> None:
        """Queue a request, to be followed by `first`, `following` until it has ended, and `end`."""
        self._answers[generation] = asyncio.Queue()
        self._batch.add(generation)
        self._work.set()

    async def first(self, generation: Generation) -> Delta:
        """Its first token."""
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        delta = await self.following(generation)
        self._metrics.first_token(generation.prompt_tokens, loop.time() - arrived_s)
        return delta

    async def following(self, generation: Generation) -> Delta:
        """Its next token."""
        return await self._answers[generation].get()

    def end(self, generation: Generation) -> None:
        """Forget it, whether it has ended, or was begun at all."""
        self._answers.pop(generation, None)
        self._batch.remove(generation)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = parse(await request.read(), ChatRequest)
        return await self._generate(request, body)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = parse(await request.read(), CompletionRequest)
        if not (self._settings.has_token_ids or isinstance(body.prompt, str)):
            raise RequestRefused("prompt must be a string (--no-token-ids)", param="prompt")
        return await self._generate(request, body)

    async def _generate(
        self, request: web.Request, body: ChatRequest | CompletionRequest
    ) -> web.StreamResponse:
        adapter = self._adapters.find(body.model)
        nature = adapter.nature if adapter else ""
        generation = generation_of(body, self._settings.limits, nature)
        wants_ids = body.return_token_ids and self._settings.has_token_ids
        request_id = request.headers.get("X-Request-Id") or uuid4().hex
        answer = Answer(
            chat=isinstance(body, ChatRequest),
            model=body.model or self._settings.model,
            request_id=request_id,
            prompt_token_ids=prompt_of(body) if wants_ids else None,
        )
        self._drill.arrived(request_id)
        try:
            if self._transfer and body.kv_transfer_params:
                await self._transfer.prepare(generation, body.kv_transfer_params, request_id)
            self.begin(generation)
            if not body.stream:
                return await self._whole(request, generation, answer)
            options = body.stream_options or StreamOptions()
            return await self._stream(request, generation, answer, options)
        except (asyncio.CancelledError, ConnectionResetError):  # the client has left
            self._drill.departed(request_id)
            raise
        finally:
            self.end(generation)

    async def _whole(
        self, request: web.Request, generation: Generation, answer: Answer
    ) -> web.Response:
        deltas = [await self.first(generation)]
        await self._drill.after(0, request)
        while deltas[-1].finish_reason is None:
            await self._drill.after(len(deltas), request)
            deltas.append(await self.following(generation))
        params = self._transfer.params(generation) if self._transfer else None
        return web.json_response(answer.whole(deltas, usage_of(generation, len(deltas)), params))

    async def _stream(
        self, request: web.Request, generation: Generation, answer: Answer, options: StreamOptions
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await self._drill.after(0, request)
        every = options.include_usage and options.continuous_usage_stats
        delta = await self.first(generation)
        await response.write(answer.opening(usage_of(generation, 0) if every else None))
        for number in itertools.count(1):
            event = answer.chunk(
                delta,
                is_first=number == 1,
                with_usage=options.include_usage,
                usage=usage_of(generation, number) if every else None,
            )
            await response.write(self._drill.instead(number) or event)
            await self._drill.after(number, request)
            if delta.finish_reason:
                break
            delta = await self.following(generation)
        usage = usage_of(generation, number) if options.include_usage else None
        await response.write(answer.closing(usage))
        await response.write_eof()
        return response

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = parse(await request.read(), TokenizeRequest)
        self._adapters.find(body.model)
        tokens = prompt_of(body)
        return web.json_response(
            {
                "count": len(tokens),
                "max_model_len": self._settings.limits.max_model_len,
                "tokens": tokens,
                "token_strs": [text_of([one]) for one in tokens]
                if body.return_token_strs
                else None,
            }
        )

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = parse(await request.read(), DetokenizeRequest)
        self._adapters.find(body.model)
        try:
            return web.json_response({"prompt": text_of(body.tokens)})
        except NoSuchToken as error:
            raise RequestRefused(str(error), param="tokens") from None

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
        data = [model, *self._adapters.cards()]
        return web.json_response({"object": "list", "data": data})

    async def _load_adapter(self, request: web.Request) -> web.Response:
        return web.Response(text=self._adapters.load(await request.read()))

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        return web.Response(text=self._adapters.unload(await request.read()))

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "bora-sim"})

    async def _scrape(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), content_type="text/plain", charset="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, which end the process at once."""
    options = parse_options(arguments)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=LOG_FORMAT)
    uvloop.run(_serve(options, os.environ.get("VLLM_API_KEY", "")))


async def _serve(options: argparse.Namespace, api_key: str) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, os._exit, 0)
    engine, _ = await listen(options, api_key)
    await engine.run()


async def listen(
    options: argparse.Namespace, api_key: str
) -> tuple[SimulatedEngine, web.AppRunner]:
    """An engine that listens, once it has "loaded"; it answers while its `run` is awaited."""
    if options.fail_after_s is not None:
        asyncio.get_running_loop().call_later(options.fail_after_s, _fail)
    settings = settings_of(options, api_key)
    # Lines as vLLM writes them, so that one parser reads both.
    logger.info("Starting to load model %s (simulated)", settings.model)
    await asyncio.sleep(options.start_delay_s)
    tell_memory(options)
    engine = SimulatedEngine(settings)
    runner = web.AppRunner(engine.application(), handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, options.host, options.port, backlog=_BACKLOG).start()
    host, port = runner.addresses[0][:2]
    logger.info("Application startup complete: http://%s:%d", host, port)
    return engine, runner


def tell_memory(options: argparse.Namespace, first_copy: int = 0) -> None:
    """Log weights and KV cache of the data-parallel copies of a node, of which one is the first."""
    gib = options.weights_bytes / 2**30
    logger.info("Model loading took %.2f GiB memory and %.6f seconds", gib, options.start_delay_s)
    copies = options.data_parallel_size
    tokens = options.kv_cache_tokens // copies
    for copy in range(first_copy, first_copy + (options.data_parallel_size_local or copies)):
        logger.info(
            "%sGPU KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx",
            f"(EngineCore_DP{copy} pid={os.getpid()}) " if copies > 1 else "",
            f"{tokens:,}",
            f"{options.max_model_len:,}",
            tokens / options.max_model_len,
        )


def _fail() -> None:
    logger.error("simulated failure (--fail-after-s)")
    os._exit(1)


if __name__ == "__main__":
    main()
