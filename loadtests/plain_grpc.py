"""gRPC without any feature, to compare with: a server of canned answers, and a bare pass-through.

    python -m loadtests.plain_grpc server --port 18501
    python -m loadtests.plain_grpc pass-through --port 18502 --server-port 18501

Both take any method and parse nothing. A method whose name ends with `Stream` gets `--chunks`
messages, one every `--tick-s` for all streams at once, as `loadtests.mock_engine` does.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import grpc
import uvloop

from gateway.proto import inference_pb2 as pb

_COMMON: dict[str, Any] = {"id": "chatcmpl-5b1f5f0c2e4b4b64", "created": 1700000000}
_COMMON["model"] = "bench"
_EXTRA = '{"object": "chat.completion", "system_fingerprint": null}'
_TEXT = "The bora falls from the plateau to the sea and clears the sky within an hour. " * 6
_WHOLE: bytes = pb.ChatCompletionResponse(
    **_COMMON,
    choices=[
        pb.ChatChoice(message=pb.ChatMessage(role="assistant", content=_TEXT), finish_reason="stop")
    ],
    usage=pb.Usage(prompt_tokens=117, completion_tokens=128, total_tokens=245),
    extra_json=_EXTRA,
).SerializeToString()
_CHUNK: bytes = pb.ChatCompletionChunk(
    **_COMMON,
    choices=[pb.ChatChunkChoice(delta=pb.ChatMessage(content=" token"))],
    extra_json=_EXTRA,
).SerializeToString()


class Ticker:
    """Wakes all streams at once."""

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._next: asyncio.Future[None] | None = None

    def next(self) -> asyncio.Future[None]:
        """Done at the next tick."""
        if self._next is None:
            loop = asyncio.get_running_loop()
            self._next = loop.create_future()
            loop.call_later(self._tick_s, self._tick)
        return self._next

    def _tick(self) -> None:
        ticked, self._next = self._next, None
        if ticked is not None:
            ticked.set_result(None)


class CannedServer(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers at once; streams by the ticker."""

    def __init__(self, num_chunks: int, tick_s: float) -> None:
        self._num_chunks = num_chunks
        self._ticker = Ticker(tick_s)

    def service(self, details: Any) -> Any:
        """The method's handler."""
        if details.method.endswith("Stream"):
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, _request: bytes, _context: Any) -> bytes:
        return _WHOLE

    async def _stream(self, _request: bytes, context: Any) -> None:
        for _ in range(self._num_chunks):
            await context.write(_CHUNK)
            await self._ticker.next()


class PassThrough(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Hands every call's bytes to a server behind it, and the answer's bytes back."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._handlers: dict[str, Any] = {}

    def service(self, details: Any) -> Any:
        """The method's handler, made once."""
        handler = self._handlers.get(details.method)
        if handler is None:
            handler = self._handlers[details.method] = self._handler(details.method)
        return handler

    def _handler(self, method: str) -> Any:
        if method.endswith("Stream"):
            ask = self._channel.unary_stream(method)

            async def stream(request: bytes, context: Any) -> None:
                call = ask(request)
                while (message := await call.read()) is not grpc.aio.EOF:
                    await context.write(message)

            return grpc.unary_stream_rpc_method_handler(stream)
        ask = self._channel.unary_unary(method)

        async def answer(request: bytes, _context: Any) -> Any:
            return await ask(request)

        return grpc.unary_unary_rpc_method_handler(answer)


async def _serve(options: argparse.Namespace) -> None:
    server = grpc.aio.server()
    if options.which == "server":
        server.add_generic_rpc_handlers((CannedServer(options.chunks, options.tick_s),))
    else:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{options.server_port}")
        server.add_generic_rpc_handlers((PassThrough(channel),))
    server.add_insecure_port(f"127.0.0.1:{options.port}")
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["server", "pass-through"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--server-port", type=int, help="of the server behind the pass-through")
    parser.add_argument("--chunks", type=int, default=128)
    parser.add_argument("--tick-s", type=float, default=0.005)
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
