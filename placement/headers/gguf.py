"""GGUF: the metadata and tensor infos at the beginning of a llama.cpp model file.

Layout (ggml-org/ggml docs/gguf.md, versions 2 and 3): magic, version, number of tensors, number of
key-value pairs, the pairs, the tensor infos, padding, the tensors' bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from placement.errors import ConfigError
from placement.headers.ranges import ByteRanges, read_exactly
from placement.headers.safetensors import StoredTensor

# id: name, weights in a block, bytes of a block (ggml.c type_traits)
GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_KEPT_ITEMS = 1024  # longer arrays (vocabularies) are counted, not kept
_MAX_COUNT = 1 << 20
_MAX_HEADER_BYTES = 1 << 28
_FIRST_READ = 1 << 18


@dataclass(frozen=True, slots=True)
class LongArray:
    """Stands for an array that is only counted."""

    length: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and tensors of one file."""

    name: str
    metadata: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]  # shapes as in ggml: the fastest dimension first

    @property
    def architecture(self) -> str:
        """`general.architecture`, "" when it is missing."""
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(source: ByteRanges) -> GgufHeader:
    """Metadata and tensor infos of a `.gguf` file.

    Raises:
        ConfigError: no GGUF, another version or byte order, truncated or damaged; says where.
    """
    cursor = _Cursor(source)
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise ConfigError(f"{source.name}: not a GGUF file: it begins with {magic!r}")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        known = "a big-endian file" if version & 0xFFFF == 0 and version else f"version {version}"
        raise ConfigError(f"{source.name}: GGUF versions 2 and 3 are supported, not {known}")
    num_tensors = cursor.count("the number of tensors")
    num_pairs = cursor.count("the number of metadata keys")
    metadata = {}
    for _ in range(num_pairs):
        key = cursor.text("a metadata key")
        metadata[key] = cursor.value(cursor.number("<I", f"the type of {key}"), key)
    tensors = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ConfigError(f"{source.name}: general.alignment is {alignment!r}")
    data = -(-cursor.position // alignment) * alignment
    _refuse_missing_data(source, data, tensors)
    return GgufHeader(source.name, metadata, tuple(tensor for tensor, _ in tensors))


def merge_parts(parts: Iterable[GgufHeader]) -> GgufHeader:
    """The header of a model split over several files: the first one's metadata, all tensors.

    Raises:
        ConfigError: parts are missing, going by `split.count`.
    """
    headers = list(parts)
    first = headers[0]
    wanted = first.metadata.get("split.count", 1)
    if isinstance(wanted, int) and wanted > len(headers):
        raise ConfigError(f"{first.name}: is split into {wanted} files, {len(headers)} are there")
    tensors = {tensor.name: tensor for header in headers for tensor in header.tensors}
    return GgufHeader(first.name, first.metadata, tuple(tensors.values()))


class _Cursor:
    """Reads a file from the beginning on, in growing pieces."""

    def __init__(self, source: ByteRanges) -> None:
        self.source = source
        self.position = 0
        self._buffer = b""

    def take(self, length: int, what: str) -> bytes:
        end = self.position + length
        if end > len(self._buffer):
            self._grow(end, what)
        taken = self._buffer[self.position : end]
        self.position = end
        return taken

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, what: str) -> int:
        value = int(self.number("<Q", what))
        if value > _MAX_COUNT:
            raise ConfigError(f"{self.source.name}: damaged header: {what} is {value:,}")
        return value

    def text(self, what: str) -> str:
        length = self.number("<Q", f"the length of {what}")
        if length > _MAX_HEADER_BYTES:
            raise ConfigError(f"{self.source.name}: damaged header: {what} of {length:,} bytes")
        return self.take(length, what).decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise ConfigError(f"{self.source.name}: damaged header: {key} has type {kind}")
        return self.number(_SCALARS[kind], key)

    def _array(self, key: str) -> Any:
        kind = self.number("<I", f"the type of {key}")
        length = self.number("<Q", f"the length of {key}")
        if kind not in _SCALARS and kind != _STRING:  # arrays in arrays are not in use
            raise ConfigError(f"{self.source.name}: damaged header: {key} is an array of {kind}")
        if length > _MAX_HEADER_BYTES:
            raise ConfigError(f"{self.source.name}: damaged header: {key} has {length:,} items")
        if length <= _KEPT_ITEMS:
            return [self.value(kind, key) for _ in range(length)]
        if kind == _STRING:
            for _ in range(length):
                self.take(self.number("<Q", key), key)
        else:
            self.take(struct.calcsize(_SCALARS[kind]) * length, key)
        return LongArray(length)

    def _grow(self, end: int, what: str) -> None:
        if end > _MAX_HEADER_BYTES:
            raise ConfigError(f"{self.source.name}: damaged header: {what} ends at byte {end:,}")
        wanted = max(end, 2 * len(self._buffer), _FIRST_READ)
        have = len(self._buffer)
        self._buffer += self.source.read(have, wanted - have)
        if end > len(self._buffer):
            read_exactly(self.source, self.position, end - self.position, what)


def _tensor_info(cursor: _Cursor) -> tuple[StoredTensor, int]:
    """A tensor and where its data begins, counted from the end of the header."""
    name = cursor.text("a tensor's name")
    where = f"{cursor.source.name}: tensor {name!r}"
    dimensions = cursor.number("<I", f"the dimensions of {name}")
    if not 1 <= dimensions <= 4:
        raise ConfigError(f"{where}: {dimensions} dimensions")
    shape = tuple(cursor.number("<Q", f"the shape of {name}") for _ in range(dimensions))
    kind = cursor.number("<I", f"the type of {name}")
    if kind not in GGML_TYPES:
        raise ConfigError(f"{where}: unknown type {kind}")
    offset = int(cursor.number("<Q", f"the offset of {name}"))
    dtype, block, block_bytes = GGML_TYPES[kind]
    if shape[0] % block or math.prod(shape) >= 1 << 60:
        raise ConfigError(f"{where}: impossible shape {list(shape)} for {dtype}")
    num_bytes = math.prod(shape) // block * block_bytes
    return StoredTensor(name=name, dtype=dtype, shape=shape, num_bytes=num_bytes), offset


def _refuse_missing_data(
    source: ByteRanges, data: int, tensors: list[tuple[StoredTensor, int]]
) -> None:
    end = max((offset + tensor.num_bytes for tensor, offset in tensors), default=0)
    if data + end > source.size_bytes:
        raise ConfigError(
            f"{source.name}: truncated: tensors end at byte {data + end:,}, the file has "
            f"{source.size_bytes:,}"
        )
    stored = sum(tensor.num_bytes for tensor, _ in tensors)
    if stored > source.size_bytes:
        raise ConfigError(f"{source.name}: damaged header: tensors overlap in the file")
