from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from gateway.endpoints import EndpointTable, ServedModel
from gateway.proto import oip_pb2 as oip
from gateway.proto import oip_pb2_grpc
from gateway.server import Gateway
from tests.gateway.engines import (
    FakeEngine,
    a_client,
    a_gateway,
    a_table,
    an_endpoint,
    an_engine,
    in_flight,
    metric,
    until,
)

Tensor = oip.ModelInferRequest.InferInputTensor
Stub = oip_pb2_grpc.GRPCInferenceServiceStub
FIELDS = {
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "FP32": "fp32_contents",
    "UINT64": "uint64_contents",
}
FORMATS = {"BOOL": "?", "INT32": "i", "FP32": "f", "FP16": "e", "UINT64": "Q"}


def a_tensor(name: str, datatype: str, /, *values: Any, **changes: Any) -> Tensor:
    values = tuple(v.encode() if isinstance(v, str) else v for v in values)
    contents = {} if datatype == "FP16" else {FIELDS[datatype]: values}
    return Tensor(
        **{"name": name, "datatype": datatype, "shape": [len(values)], **changes}, contents=contents
    )


def a_request(*inputs: Tensor, **changes: Any) -> oip.ModelInferRequest:
    parameters = changes.pop("parameters", {})
    outputs = [
        oip.ModelInferRequest.InferRequestedOutputTensor(name=name)
        for name in changes.pop("outputs", ())
    ]
    request = oip.ModelInferRequest(
        **{"model_name": "chat", "inputs": inputs or (text("Say"),), "outputs": outputs, **changes}
    )
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def text(*values: str, name: str = "text_input", **changes: Any) -> Tensor:
    return a_tensor(name, "BYTES", *values, **changes)


def messages() -> Tensor:
    return a_tensor("messages", "BYTES", json.dumps([{"role": "user", "content": "hi"}]))


def flag(name: str, *, value: bool = True) -> Tensor:
    return a_tensor(name, "BOOL", value)


def as_raw(request: oip.ModelInferRequest) -> oip.ModelInferRequest:
    """The same request in the other encoding."""
    for tensor in request.inputs:
        values = list(getattr(tensor.contents, FIELDS[tensor.datatype]))
        if tensor.datatype == "BYTES":
            raw = b"".join(struct.pack("<I", len(value)) + value for value in values)
        else:
            raw = struct.pack(f"<{len(values)}{FORMATS[tensor.datatype]}", *values)
        request.raw_input_contents.append(raw)
        tensor.ClearField("contents")
    return request


def texts_in(response: oip.ModelInferResponse, name: str = "text_output") -> list[str]:
    """What a BYTES output says, in either encoding."""
    at = [output.name for output in response.outputs].index(name)
    output = response.outputs[at]
    result = [value.decode() for value in output.contents.bytes_contents]
    if response.raw_output_contents:
        raw = response.raw_output_contents[at]
        while raw:
            (length,) = struct.unpack_from("<I", raw)
            result.append(raw[4 : 4 + length].decode())
            raw = raw[4 + length :]
    assert list(output.shape) == [len(result)]
    return result


@asynccontextmanager
async def a_service(
    engine: FakeEngine | None = None, table: EndpointTable | None = None, **changes: Any
) -> AsyncIterator[tuple[Gateway, Stub]]:
    if engine:
        table = a_table(an_endpoint(engine))
    async with (
        a_gateway(table, grpc_port=0, **changes) as gateway,
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel,
    ):
        yield gateway, Stub(channel)


async def streamed(stub: Stub, *requests: Any) -> list[oip.ModelStreamInferResponse]:
    return [response async for response in stub.ModelStreamInfer(iter(requests))]


@pytest.mark.parametrize("encoded", [lambda request: request, as_raw])
async def test_a_text_is_completed_in_the_encoding_that_the_client_uses(
    encoded: Callable[[oip.ModelInferRequest], oip.ModelInferRequest],
) -> None:
    request = encoded(a_request(text("Säy"), flag("exclude_input_in_output"), id="7"))
    async with an_engine() as engine, a_service(engine) as (_, stub):
        response = await stub.ModelInfer(request, metadata=[("x-request-id", "oip-1")])

    assert engine.seen[0].path == "/v1/completions"
    assert engine.seen[0].json == {"model": "chat", "prompt": "Säy", "stream": False}
    assert engine.seen[0].headers["x-request-id"] == "oip-1"
    assert texts_in(response) == ["Hello big world"]
    assert bool(response.raw_output_contents) == bool(request.raw_input_contents)
    assert (response.model_name, response.model_version, response.id) == ("chat", "1", "7")


@pytest.mark.parametrize("name", ["text_input", "prompt", "PROMPT"])
async def test_the_text_comes_back_before_its_continuation_unless_excluded(name: str) -> None:
    async with an_engine() as engine, a_service(engine) as (_, stub):
        response = await stub.ModelInfer(a_request(text("Say: ", name=name)))

    assert texts_in(response) == ["Say: Hello big world"]


async def test_messages_are_a_chat() -> None:
    async with an_engine() as engine, a_service(engine) as (_, stub):
        response = await stub.ModelInfer(a_request(messages()))

    assert engine.seen[0].path == "/v1/chat/completions"
    assert engine.seen[0].json["messages"] == [{"role": "user", "content": "hi"}]
    assert texts_in(response) == ["Hello big world"]


async def test_sampling_comes_by_parameters_json_and_tensors_in_the_engines_types() -> None:
    bundle = {"temperature": "0.1", "top_k": "20", "stop": '["a", "b"]', "max_tokens": 7}
    request = a_request(
        text("Say"),
        a_tensor("sampling_parameters", "BYTES", json.dumps(bundle)),
        a_tensor("max_tokens", "INT32", 9),
        a_tensor("top_p", "FP32", 0.3),
        a_tensor("seed", "UINT64", 2**63),
        parameters={
            "max_tokens": 5,
            "temperature": 0.9,
            "ignore_eos": "True",
            "frequency_penalty": 1,
            "response_format": '{"type": "json_object"}',
            "priority": 3,
            "triton_enable_empty_final_response": True,
        },
    )
    async with an_engine() as engine, a_service(engine) as (_, stub):
        await stub.ModelInfer(request)

    assert engine.seen[0].json == {
        "model": "chat",
        "prompt": "Say",
        "stream": False,
        "temperature": 0.1,
        "top_k": 20,
        "stop": ["a", "b"],
        "max_tokens": 9,
        "top_p": 0.3,
        "seed": 2**63,
        "ignore_eos": True,
        "frequency_penalty": 1.0,
        "response_format": {"type": "json_object"},
    }


async def test_a_batch_of_texts_is_one_request_with_as_many_answers() -> None:
    async with an_engine() as engine, a_service(engine) as (_, stub):
        response = await stub.ModelInfer(
            a_request(text("a", "b", shape=[2, 1]), flag("exclude_input_in_output"))
        )

    assert engine.seen[0].json["prompt"] == ["a", "b"]
    assert texts_in(response) == ["Hello big world", ""]  # this engine answers the first only


async def test_finish_reason_and_token_counts_come_when_asked_for() -> None:
    counted = flag("return_num_output_tokens")
    async with an_engine() as engine, a_service(engine) as (_, stub):
        request = a_request(text("Say"), counted, outputs=["text_output", "finish_reason"])
        response = await stub.ModelInfer(request)

    assert [output.name for output in response.outputs] == [
        *("text_output", "finish_reason", "num_output_tokens")
    ]
    assert texts_in(response, "finish_reason") == ["stop"]
    assert list(response.outputs[2].contents.uint_contents) == [3]


@pytest.mark.parametrize(("prompt", "path"), [(text("Say"), "completions"), (messages(), "chat")])
@pytest.mark.parametrize("encoded", [lambda request: request, as_raw])
async def test_a_stream_gives_the_text_piece_by_piece(
    prompt: Tensor, path: str, encoded: Callable[[oip.ModelInferRequest], oip.ModelInferRequest]
) -> None:
    request = encoded(a_request(prompt, flag("stream"), id="s"))
    async with an_engine() as engine, a_service(engine) as (gateway, stub):
        responses = await streamed(stub, request)
        assert in_flight(gateway) == 0

    assert path in engine.seen[0].path
    assert engine.seen[0].json["stream"] is True
    assert [texts_in(r.infer_response) for r in responses] == [["Hello"], [" big"], [" world"]]
    assert {r.infer_response.id for r in responses} == {"s"}
    assert not any(r.error_message for r in responses)


async def test_a_stream_without_the_flag_has_one_response_and_the_empty_final_one_if_asked() -> (
    None
):
    request = a_request(parameters={"triton_enable_empty_final_response": True})
    async with an_engine() as engine, a_service(engine) as (_, stub):
        whole, final = await streamed(stub, request)

    assert texts_in(whole.infer_response) == ["SayHello big world"]
    assert not whole.infer_response.parameters["triton_final_response"].bool_param
    assert not final.infer_response.outputs
    assert final.infer_response.parameters["triton_final_response"].bool_param


async def test_a_streams_token_counts_add_up() -> None:
    request = a_request(
        text("Say"),
        flag("stream"),
        outputs=["text_output", "num_input_tokens", "num_output_tokens"],
    )
    async with an_engine() as engine, a_service(engine) as (_, stub):
        responses = await streamed(stub, request)

    counts = [r.infer_response.outputs[2].contents.uint_contents[0] for r in responses]
    assert sum(counts) == 3
    assert responses[-1].infer_response.outputs[1].contents.uint_contents[0] == 7
    assert engine.seen[0].json["stream_options"]["include_usage"] is True


async def test_requests_of_one_stream_run_side_by_side_and_fail_by_themselves() -> None:
    async with an_engine(gate=asyncio.Event()) as engine, a_service(engine) as (_, stub):
        stream = stub.ModelStreamInfer()
        await stream.write(a_request(flag("stream"), text("a"), id="1"))
        await stream.write(a_request(flag("stream"), text("b"), id="2"))
        await until(lambda: engine.running == 2)
        await stream.write(a_request(model_name="nope", id="3"))
        failed = await stream.read()
        engine.gate.set()
        await stream.done_writing()
        rest = []
        while (response := await stream.read()) is not grpc.aio.EOF:
            rest.append(response)

    assert "the model 'nope' does not exist" in failed.error_message
    assert failed.infer_response.id == "3"
    for number in ("1", "2"):
        mine = [r.infer_response for r in rest if r.infer_response.id == number]
        assert "".join(texts_in(r)[0] for r in mine) == "Hello big world"


async def test_an_engine_that_dies_within_a_stream_is_told_to_its_request() -> None:
    request = a_request(text("a"), flag("stream"), id="1")
    async with an_engine(die_after_words=1) as engine, a_service(engine) as (gateway, stub):
        first, failed = await streamed(stub, request)
        assert in_flight(gateway) == 0

    assert texts_in(first.infer_response) == ["Hello"]
    assert "broke off" in failed.error_message
    assert failed.infer_response.id == "1"


async def test_a_cancelled_stream_stops_all_its_engines_work() -> None:
    async with an_engine(word_gate=asyncio.Event()) as engine, a_service(engine) as (gateway, stub):
        stream = stub.ModelStreamInfer()
        for number in range(2):
            await stream.write(a_request(flag("stream"), text("a"), id=str(number)))
        await until(lambda: engine.running == 2)
        await stream.read()

        stream.cancel()

        await until(lambda: engine.hung_up_on == 2)
        await until(lambda: in_flight(gateway) == 0)


async def test_tritons_timeout_parameter_is_in_microseconds() -> None:
    async with an_engine(gate=asyncio.Event()) as engine, a_service(engine) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(a_request(parameters={"timeout": 100_000}))

    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "0.1 s" in failed.value.details()


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (a_request(a_tensor("image", "BYTES", "x")), "text_input (or prompt) or messages"),
        (a_request(text("a"), messages()), "has text_input and messages"),
        (a_request(text("a"), text("b")), "given twice"),
        (a_request(text()), "not empty"),
        (a_request(a_tensor("text_input", "INT32", 1)), "must be BYTES"),
        (a_request(a_tensor("messages", "BYTES", "{")), "messages is not valid JSON"),
        (a_request(a_tensor("messages", "BYTES", "{}")), "JSON list"),
        (a_request(text("a", shape=[2])), "do not fit the shape [2]"),
        (a_request(text("a", shape=[-1])), "do not fit the shape [-1]"),
        (a_request(text("a", datatype="STRING")), "known datatypes are BOOL"),
        (a_request(text("a"), a_tensor("top_p", "FP16", shape=[1])), "only be sent as raw bytes"),
        (a_request(text("a"), text("b", name="image")), "there is no input 'image'"),
        (a_request(text("a"), a_tensor("max_tokens", "INT32", 1, 2)), "one element, not 2"),
        (a_request(parameters={"max_tokenz": 5}), "did you mean 'max_tokens'"),
        (a_request(parameters={"max_tokens": "many"}), "max_tokens cannot be 'many'"),
        (a_request(parameters={"max_tokens": 1.5}), "max_tokens cannot be '1.5'"),
        (a_request(parameters={"ignore_eos": "perhaps"}), "ignore_eos cannot be 'perhaps'"),
        (a_request(parameters={"response_format": "{"}), "response_format cannot be '{'"),
        (a_request(parameters={"temperature": "nan"}), "temperature cannot be 'nan'"),
        (a_request(parameters={"sequence_id": 5}), "sequences are not supported"),
        (a_request(text("a"), text("[]", name="sampling_parameters")), "must be a JSON object"),
        (a_request(text("a"), text('{"x": 1}', name="sampling_parameters")), "no sampling parameter"),
        (a_request(text("a"), flag("stream")), "use ModelStreamInfer"),
        (a_request(messages(), flag("exclude_input_in_output", value=False)), "without a stream"),
        (a_request(outputs=["logits"]), "no output 'logits'; known: text_output"),
        (a_request(model_version="2"), "version '1' only"),
        (a_request(text("a", "b"), flag("return_num_output_tokens")), "counted for one text"),
        (a_request(raw_input_contents=[b"", b""]), "2 entries for 1 inputs"),
        (a_request(raw_input_contents=[b"\x05\0\0\0ab"]), "end within an element"),
        (a_request(raw_input_contents=[b"\x05\0"]), "end within an element"),
        (a_request(raw_input_contents=[b"\x01\0\0\0\xff"]), "not UTF-8"),
        (a_request(model_name=""), "`model` is required"),
    ],
)  # fmt: skip
async def test_what_makes_no_sense_is_refused_by_name(
    request_: oip.ModelInferRequest, told: str
) -> None:
    async with an_engine() as engine, a_service(engine) as (gateway, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(request_)
        async with a_client(gateway) as client:
            assert await metric(client, "bora_gateway_requests_total", api="oip", status="400") == 1

    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert told in failed.value.details()
    assert not engine.seen


async def test_tensors_in_shared_memory_are_refused() -> None:
    request = a_request()
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    async with an_engine() as engine, a_service(engine) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(request)

    assert "send its contents" in failed.value.details()


@pytest.mark.parametrize(
    ("http_status", "status"),
    [
        (400, grpc.StatusCode.INVALID_ARGUMENT),
        (401, grpc.StatusCode.UNAUTHENTICATED),
        (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (500, grpc.StatusCode.INTERNAL),
        (503, grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_the_engines_errors_become_statuses(
    http_status: int, status: grpc.StatusCode
) -> None:
    async with an_engine(status=http_status) as engine, a_service(engine) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelInfer(a_request())

    assert (failed.value.code(), failed.value.details()) == (status, "engine says no")


async def test_an_answer_without_choices_is_the_engines_fault() -> None:
    event = b'data: {"object": "x"}\n\n'
    async with an_engine(raw_chunks=(event,)) as engine, a_service(engine) as (_, stub):
        (failed,) = await streamed(stub, a_request(text("a"), flag("stream")))

    assert failed.error_message == "the engine's answer has no choices"


async def test_the_server_and_its_models_describe_themselves() -> None:
    table = EndpointTable(models=(ServedModel(name="asleep", aliases=("zzz",)),))
    async with an_engine() as engine:
        table = a_table(
            an_endpoint(engine), models=(*a_table(an_endpoint(engine)).models, *table.models)
        )
        async with a_service(table=table) as (gateway, stub):
            assert (await stub.ServerLive(oip.ServerLiveRequest())).live
            assert (await stub.ServerReady(oip.ServerReadyRequest())).ready
            ready = {
                name: (await stub.ModelReady(oip.ModelReadyRequest(name=name))).ready
                for name in ("chat", "asleep", "nope")
            }
            server = await stub.ServerMetadata(oip.ServerMetadataRequest())
            model = await stub.ModelMetadata(oip.ModelMetadataRequest(name="zzz"))
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await stub.ModelMetadata(oip.ModelMetadataRequest(name="nope"))
            await gateway.drain(0)
            drained = await stub.ServerReady(oip.ServerReadyRequest())

    assert ready == {"chat": True, "asleep": False, "nope": False}
    assert server.name == "bora"
    assert (model.name, list(model.versions)) == ("zzz", ["1"])
    assert {(i.name, i.datatype) for i in model.inputs} >= {("text_input", "BYTES")}
    assert next(o.name for o in model.outputs) == "text_output"
    assert failed.value.code() == grpc.StatusCode.NOT_FOUND
    assert not drained.ready


def test_names_and_numbers_are_those_of_the_published_protocol() -> None:
    published = {
        "ModelInferRequest": "model_name model_version id parameters inputs outputs raw_input_contents",
        "ModelInferResponse": "model_name model_version id parameters outputs raw_output_contents",
        "ModelStreamInferResponse": "error_message infer_response",
        "InferParameter": "bool_param int64_param string_param double_param uint64_param",
        "ModelMetadataResponse": "name versions platform inputs outputs",
        "ServerMetadataResponse": "name version extensions",
        "InferTensorContents": "bool_contents int_contents int64_contents uint_contents"
        " uint64_contents fp32_contents fp64_contents bytes_contents",
    }
    messages_of = oip.DESCRIPTOR.message_types_by_name
    for name, fields in published.items():
        numbered = {field.number: field.name for field in messages_of[name].fields}
        assert numbered == dict(enumerate(fields.split(), start=1))
    assert oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name == (
        "inference.GRPCInferenceService"
    )
