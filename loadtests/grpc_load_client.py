"""A gRPC load generator of one process: calls that are made again as soon as answered.

    python -m loadtests.grpc_load_client --port 8001 --calls 64 --seconds 3 [--stream]

Prints one line of JSON: requests, messages of streams, failures, and latency percentiles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import uvloop

from gateway.proto import inference_pb2 as pb
from gateway.proto import oip_pb2 as oip
from loadtests.load_client import KEY

_TEXT = "List what could go wrong when a clock on one of three servers runs backwards. " * 5
_CHANNELS = 8
_AUTHORIZED = (("authorization", f"Bearer {KEY}"),)


@dataclass
class Tally:
    """What all calls saw."""

    until: float
    requests: int = 0
    messages: int = 0
    failures: int = 0
    error: str = ""
    latencies_s: list[float] = field(default_factory=list)


def _chat(*, stream: bool) -> tuple[str, bytes]:
    request = pb.ChatCompletionRequest(
        model="bench", messages=[pb.ChatMessage(role="user", content=_TEXT)], max_tokens=128
    )
    if stream:
        request.stream_options.include_usage = True
    method = "ChatCompletionStream" if stream else "ChatCompletion"
    return f"/bora.v1.Inference/{method}", request.SerializeToString()


def _infer(*, stream: bool) -> tuple[str, bytes]:
    tensor = oip.ModelInferRequest.InferInputTensor
    text = _TEXT.encode()
    request = oip.ModelInferRequest(
        model_name="bench",
        inputs=[
            tensor(name="text_input", datatype="BYTES", shape=[1]),
            tensor(name="stream", datatype="BOOL", shape=[1]),
        ],
        raw_input_contents=[len(text).to_bytes(4, "little") + text, bytes([stream])],
    )
    request.parameters["max_tokens"].int64_param = 128
    method = "ModelStreamInfer" if stream else "ModelInfer"
    return f"/inference.GRPCInferenceService/{method}", request.SerializeToString()


async def _unary(channel: Any, method: str, request: bytes, tally: Tally) -> None:
    ask = channel.unary_unary(method)
    while True:
        started = time.perf_counter()
        await ask(request, metadata=_AUTHORIZED)
        _count(tally, started)
        if time.perf_counter() >= tally.until:
            return


async def _streamed(channel: Any, method: str, request: bytes, tally: Tally) -> None:
    if method.endswith("ModelStreamInfer"):
        two_way = channel.stream_stream(method)

        def ask(one: bytes) -> Any:
            return two_way(iter((one,)), metadata=_AUTHORIZED)
    else:
        one_way = channel.unary_stream(method)

        def ask(one: bytes) -> Any:
            return one_way(one, metadata=_AUTHORIZED)

    while True:
        started = time.perf_counter()
        call = ask(request)
        while await call.read() is not grpc.aio.EOF:
            tally.messages += 1
        _count(tally, started)
        if time.perf_counter() >= tally.until:
            return


def _count(tally: Tally, started: float) -> None:
    tally.requests += 1
    tally.latencies_s.append(time.perf_counter() - started)


async def _drive(options: argparse.Namespace) -> Tally:
    method, request = (_infer if options.oip else _chat)(stream=options.stream)
    tally = Tally(time.perf_counter() + options.seconds)
    settings = (("grpc.use_local_subchannel_pool", 1),)  # connections of their own
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{options.port}", options=settings)
        for _ in range(min(_CHANNELS, options.calls))
    ]
    run = _streamed if options.stream else _unary
    ends = await asyncio.gather(
        *(
            run(channels[number % len(channels)], method, request, tally)
            for number in range(options.calls)
        ),
        return_exceptions=True,
    )
    for end in ends:
        if isinstance(end, grpc.aio.AioRpcError):
            tally.failures += 1
            tally.error = f"{end.code()}: {end.details()}"
        elif end is not None:
            raise end
    for channel in channels:
        await channel.close()
    return tally


def main() -> None:
    """Ask, then print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--calls", type=int, default=64, help="at once, over 8 connections")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--oip", action="store_true", help="the Open Inference Protocol's form")
    tally = uvloop.run(_drive(parser.parse_args()))
    latencies = sorted(tally.latencies_s) or [0.0]
    seen = {
        "requests": tally.requests,
        "messages": tally.messages,
        "failures": tally.failures,
        "error": tally.error,
        "p50_s": latencies[len(latencies) // 2],
        "p99_s": latencies[len(latencies) * 99 // 100],
    }
    print(json.dumps(seen))  # noqa: T201 - this is its output


if __name__ == "__main__":
    main()
