"""Tensors <-> lists of values, in the protocol's two encodings: typed `contents`, and raw bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

from gateway.errors import BadRequest
from gateway.proto import oip_pb2 as oip

# datatype -> (its field of InferTensorContents, its struct format; BYTES have none)
_TYPES = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP16": ("", "e"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BYTES": ("bytes_contents", ""),
}
_FP32_DIGITS = 7
_LENGTH = struct.Struct("<I")


def inputs_of(request: oip.ModelInferRequest) -> dict[str, list[Any]]:
    """The values of every input tensor by its name, row-major. BYTES are texts.

    Raises:
        BadRequest: a tensor is not what its datatype and shape say; the message names it.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequest(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs;"
            " give one for each, in the same order"
        )
    result: dict[str, list[Any]] = {}
    for number, tensor in enumerate(request.inputs):
        if tensor.name in result:
            raise BadRequest(f"the input {tensor.name!r} is given twice", param=tensor.name)
        if "shared_memory_region" in tensor.parameters:
            raise BadRequest(
                f"the input {tensor.name!r} is in shared memory, which is not supported; send its"
                " contents",
                param=tensor.name,
            )
        values = _values(tensor, raw[number] if raw else None)
        shape = list(tensor.shape)
        if len(values) != math.prod(shape) or min(shape, default=0) < 0:
            raise _misfit(tensor, f"{len(values)} elements do not fit the shape {shape}")
        result[tensor.name] = values
    return result


def add_output(
    response: oip.ModelInferResponse, name: str, datatype: str, values: Sequence[Any], *, raw: bool
) -> None:
    """Append a tensor of one dimension. BYTES take texts."""
    tensor = response.outputs.add()
    tensor.name, tensor.datatype = name, datatype
    tensor.shape.append(len(values))
    field, code = _TYPES[datatype]
    encoded = [value.encode() for value in values] if datatype == "BYTES" else values
    if not raw:
        getattr(tensor.contents, field).extend(encoded)
    elif datatype == "BYTES":
        response.raw_output_contents.append(
            b"".join([_LENGTH.pack(len(text)) + text for text in encoded])
        )
    else:
        response.raw_output_contents.append(struct.pack(f"<{len(values)}{code}", *values))


def set_text(response: oip.ModelInferResponse, text: str) -> None:
    """Replace the text of a response whose only output has one."""
    encoded = text.encode()
    if response.raw_output_contents:
        response.raw_output_contents[0] = _LENGTH.pack(len(encoded)) + encoded
    else:
        response.outputs[0].contents.bytes_contents[0] = encoded


def _values(tensor: oip.ModelInferRequest.InferInputTensor, raw: bytes | None) -> list[Any]:
    known = _TYPES.get(tensor.datatype)
    if known is None:
        raise _misfit(tensor, f"known datatypes are {', '.join(_TYPES)}")
    field, code = known
    if raw is not None:
        values = _texts_of(tensor, raw) if not code else _numbers_of(tensor, raw, code)
    elif not field:
        raise _misfit(tensor, "it can only be sent as raw bytes")
    else:
        values = list(getattr(tensor.contents, field))
    if tensor.datatype == "BYTES":
        return [_text(tensor, value) for value in values]
    if tensor.datatype == "FP32":  # 0.1 is to reach the engine as 0.1
        return [float(format(value, f".{_FP32_DIGITS}g")) for value in values]
    return values


def _numbers_of(tensor: Any, raw: bytes, code: str) -> list[Any]:
    size = struct.calcsize(f"<{code}")
    if len(raw) % size:
        raise _misfit(tensor, f"{len(raw)} raw bytes are no multiple of {size}")
    return list(struct.unpack(f"<{len(raw) // size}{code}", raw))


def _texts_of(tensor: Any, raw: bytes) -> list[bytes]:
    """Elements, each after its length in 4 bytes, little-endian."""
    result, at = [], 0
    while at < len(raw):
        start = at + _LENGTH.size
        length = _LENGTH.unpack_from(raw, at)[0] if start <= len(raw) else 0
        at = start + length
        if at > len(raw):
            raise _misfit(tensor, "its raw bytes end within an element (4 bytes of length, text)")
        result.append(raw[start:at])
    return result


def _text(tensor: Any, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _misfit(tensor, "an element is not UTF-8") from None


def _misfit(tensor: Any, reason: str) -> BadRequest:
    name = tensor.name[:100]
    return BadRequest(f"the input {name!r} of type {tensor.datatype[:20]!r}: {reason}", param=name)
