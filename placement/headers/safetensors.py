"""Safetensors: the JSON header before the tensors, and the index of a checkpoint in several files.

Layout: 8 bytes little-endian header length, the JSON header, the tensors' bytes
(huggingface/safetensors, README "Format"; lengths over 100 MB are refused there too).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from placement.errors import ConfigError
from placement.headers.ranges import ByteRanges, read_exactly

_MAX_HEADER_BYTES = 100_000_000
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file stores it; its data is not read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_safetensors(source: ByteRanges) -> tuple[StoredTensor, ...]:
    """The tensors of one `.safetensors` file, from its header alone.

    Raises:
        ConfigError: the file is truncated or its header is damaged; the message says where.
    """
    length = int.from_bytes(read_exactly(source, 0, 8, "the header's length"), "little")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise ConfigError(f"{source.name}: not safetensors: a header of {length:,} bytes")
    text = read_exactly(source, 8, length, "the header")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source.name}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ConfigError(f"{source.name}: the header is no JSON object")
    tensors = [
        (_tensor(source.name, name, entry), entry)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    ends = [entry["data_offsets"][1] for _, entry in tensors]
    if ends and 8 + length + max(ends) > source.size_bytes:
        raise ConfigError(
            f"{source.name}: truncated: tensors end at byte {8 + length + max(ends):,}, the file "
            f"has {source.size_bytes:,}"
        )
    stored = sum(tensor.num_bytes for tensor, _ in tensors)
    if stored > source.size_bytes:
        raise ConfigError(f"{source.name}: damaged header: tensors overlap in the file")
    return tuple(tensor for tensor, _ in tensors)


def index_files(text: str | bytes, name: str) -> tuple[str, ...]:
    """The files that a `model.safetensors.index.json` spreads the tensors over.

    Raises:
        ConfigError: no JSON, no `weight_map`, or a file name that leaves the folder.
    """
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid JSON: {error}") from None
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise ConfigError(f"{name}: has no weight_map")
    files = set(mapping.values())
    for file in files:
        if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
            raise ConfigError(f"{name}: weight_map names {file!r}, which is no file beside it")
    return tuple(sorted(files))


def _tensor(file: str, name: str, entry: Any) -> StoredTensor:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: its entry is no JSON object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ConfigError(f"{where}: unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise ConfigError(f"{where}: impossible shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConfigError(f"{where}: impossible data_offsets {offsets!r}")
    num_bytes = offsets[1] - offsets[0]
    if num_bytes != (math.prod(shape) * _BITS[dtype] + 7) // 8:
        raise ConfigError(f"{where}: {dtype} {shape} does not take {num_bytes:,} bytes")
    return StoredTensor(name=name, dtype=dtype, shape=tuple(shape), num_bytes=num_bytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 60
        for size in value
    )
