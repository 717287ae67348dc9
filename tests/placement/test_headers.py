from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import ConfigError
from placement.gguf_weights import weights_from_header
from placement.headers.gguf import LongArray, merge_parts, read_gguf
from placement.headers.gguf_model import gguf_architecture
from placement.headers.model_files import local_model
from placement.headers.ranges import LocalFile
from placement.headers.safetensors import index_files, read_safetensors
from tests.placement.header_files import (
    a_mistral_gguf,
    gguf_bytes,
    in_memory,
    safetensors_bytes,
)
from tests.placement.test_hf_config import MISTRAL

WEIGHTS = {"a.weight": ("BF16", (4, 8)), "b.weight": ("F32", (3,))}


def test_safetensors_headers_give_names_types_and_sizes():
    tensors = read_safetensors(in_memory(safetensors_bytes(WEIGHTS)))

    assert [(each.name, each.dtype, each.shape, each.num_bytes) for each in tensors] == [
        ("a.weight", "BF16", (4, 8), 64),
        ("b.weight", "F32", (3,), 12),
    ]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "truncated: the header's length"),
        (b"\x05\x00", "truncated: the header's length"),
        (struct.pack("<Q", 1 << 40) + b"{}", "a header of 1,099,511,627,776 bytes"),
        (struct.pack("<Q", 100) + b"{}", "truncated: the header"),
        (struct.pack("<Q", 4) + b"nope", "not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (safetensors_bytes(WEIGHTS, data=False), "truncated: tensors end at byte"),
        (safetensors_bytes(WEIGHTS)[:-1], "truncated: tensors end at byte"),
    ],
)
def test_damaged_safetensors_are_refused_with_name_and_cause(content: bytes, cause: str):
    with pytest.raises(ConfigError, match=cause) as refused:
        read_safetensors(in_memory(content, "model-00001.safetensors"))

    assert "model-00001.safetensors" in str(refused.value)


@pytest.mark.parametrize(
    "entry",
    [
        7,
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
    ],
)
def test_impossible_tensors_are_refused(entry: Any):
    text = json.dumps({"w": entry}).encode()

    with pytest.raises(ConfigError, match="tensor 'w'"):
        read_safetensors(in_memory(struct.pack("<Q", len(text)) + text + bytes(8)))


def test_tensors_that_overlap_do_not_count_twice():
    entry = {"dtype": "F32", "shape": [256], "data_offsets": [0, 1024]}
    text = json.dumps({"a": entry, "b": entry}).encode()

    with pytest.raises(ConfigError, match="overlap"):
        read_safetensors(in_memory(struct.pack("<Q", len(text)) + text + bytes(1024)))


def test_an_index_names_its_files_once():
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}

    assert index_files(json.dumps(index), "index") == ("m-1.safetensors", "m-2.safetensors")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}',
             '{"weight_map": {"a": 1}}'],
)  # fmt: skip
def test_an_index_that_cannot_be_right_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"index\.json"):
        index_files(text, "index.json")


def test_gguf_metadata_and_tensor_sizes_are_read():
    header = read_gguf(in_memory(a_mistral_gguf()))

    assert header.architecture == "llama"
    assert header.metadata["llama.block_count"] == 2
    sizes = {tensor.name: tensor.num_bytes for tensor in header.tensors}
    assert sizes["token_embd.weight"] == 64 * 96 * 2
    assert sizes["blk.1.ffn_up.weight"] == 64 * 128 * 2


def test_vocabularies_are_counted_but_not_kept():
    content = gguf_bytes({"tokenizer.ggml.tokens": [f"t{index}" for index in range(2000)]}, {})

    assert read_gguf(in_memory(content)).metadata["tokenizer.ggml.tokens"] == LongArray(2000)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "truncated: the magic"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "not version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "the number of tensors is"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50), "a metadata key of"),
        (a_mistral_gguf()[:300], "truncated"),
        (a_mistral_gguf()[:-64], "truncated: tensors end at byte"),
    ],
)
def test_damaged_gguf_files_are_refused_with_name_and_cause(content: bytes, cause: str):
    with pytest.raises(ConfigError, match=cause) as refused:
        read_gguf(in_memory(content, "m.gguf"))

    assert "m.gguf" in str(refused.value)


def test_a_gguf_header_holds_the_architecture():
    architecture = gguf_architecture(read_gguf(in_memory(a_mistral_gguf(experts=4))))

    assert architecture.num_layers == 2
    assert architecture.num_kv_heads == 2
    assert architecture.head_dim == 16
    assert architecture.moe is not None
    assert architecture.moe.num_experts == 4
    assert not architecture.tied_embeddings


@pytest.mark.parametrize(
    ("metadata", "cause"),
    [
        ({"general.architecture": "rwkv"}, "'rwkv' is not supported"),
        ({"general.architecture": "llama"}, r"no llama\.attention\.head_count"),
        (
            {"general.architecture": "llama", "llama.attention.head_count": "8"},
            r"llama\.attention\.head_count is '8'",
        ),
    ],
)
def test_gguf_metadata_that_says_too_little_is_refused(metadata: dict[str, Any], cause: str):
    with pytest.raises(ConfigError, match=cause):
        gguf_architecture(read_gguf(in_memory(gguf_bytes(metadata, {}))))


def test_bytes_of_a_gguf_go_where_llama_cpp_puts_them():
    header = read_gguf(in_memory(a_mistral_gguf(experts=4)))

    weights = weights_from_header(header, gguf_architecture(header))

    assert weights.embedding == 64 * 96 * 2
    assert weights.head == 64 * 96 * 2 + 64 * 4  # and the last norm
    assert [layer.experts for layer in weights.layers] == [64 * 128 * 4 * 2] * 2
    assert not weights.head_is_embedding


def test_a_tied_head_is_a_second_copy_of_the_embedding():
    header = read_gguf(in_memory(a_mistral_gguf(tied=1)))

    weights = weights_from_header(header, gguf_architecture(header))

    assert weights.head_is_embedding
    assert weights.head == weights.embedding + 64 * 4


def test_a_gguf_file_is_a_model_with_its_own_sizes(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(a_mistral_gguf())

    model, header = local_model(path)

    assert header is not None
    [checkpoint] = model.checkpoints
    assert (checkpoint.format, checkpoint.precision) == ("gguf", "fp16")
    assert checkpoint.size_bytes == sum(tensor.num_bytes for tensor in header.tensors)


def test_a_folder_with_weights_has_the_size_of_its_tensors(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(WEIGHTS))

    model, _ = local_model(tmp_path)

    assert model.checkpoints[0].size_bytes == 76


def test_weights_that_a_folder_holds_twice_count_once(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    index = {"weight_map": {"a.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model-1.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(safetensors_bytes(WEIGHTS))

    model, _ = local_model(tmp_path)

    assert model.checkpoints[0].size_bytes == 76


def test_a_folder_without_some_of_its_files_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ConfigError, match=r"2 files are missing: model-1\.safetensors"):
        local_model(tmp_path)


def test_a_folder_with_a_configuration_alone_has_no_size(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))

    model, _ = local_model(tmp_path)

    assert model.checkpoints[0].size_bytes is None


def test_all_parts_of_a_split_file_are_needed(tmp_path: Path):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(a_mistral_gguf())

    with pytest.raises(ConfigError, match="1 of 2 parts"):
        local_model(tmp_path / "m-00001-of-00002.gguf")


def test_parts_of_a_split_file_add_up():
    first = read_gguf(in_memory(a_mistral_gguf()))
    second = read_gguf(in_memory(gguf_bytes({}, {"extra.weight": ("F32", (8,))})))

    assert len(merge_parts([first, second]).tensors) == len(first.tensors) + 1


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"null"])
def test_a_broken_configuration_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(ConfigError):
        local_model(tmp_path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_gguf(LocalFile(tmp_path / "none.gguf"))


VALID = (a_mistral_gguf(experts=2), safetensors_bytes(WEIGHTS))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_headers_never_give_more_bytes_than_the_file_has(data: st.DataObject):
    whole = data.draw(st.sampled_from(VALID))
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            at = data.draw(st.integers(0, min(len(content), 900) - 1))
            content[at] = data.draw(st.integers(0, 255))
    source = in_memory(bytes(content))
    try:
        header = read_gguf(source) if whole is VALID[0] else None
        tensors = header.tensors if header else read_safetensors(source)
    except ConfigError:
        return
    assert sum(tensor.num_bytes for tensor in tensors) <= len(content)
    if header is not None:
        try:
            architecture = gguf_architecture(header)
            weights = weights_from_header(header, architecture)
        except ConfigError:
            return
        assert 0 < weights.embedding <= len(content)
        assert weights.head > 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(content: bytes):
    for read in (read_gguf, read_safetensors):
        try:
            read(in_memory(b"GGUF" + content if read is read_gguf else content))
        except ConfigError:
            continue
