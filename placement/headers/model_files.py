"""From headers to a catalogue entry: precision, size and architecture of a model's own files."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from placement.catalogue import Checkpoint, ModelSpec, Precision
from placement.errors import ConfigError
from placement.headers.gguf import GgufHeader, merge_parts, read_gguf
from placement.headers.gguf_model import gguf_architecture
from placement.headers.ranges import LocalFile
from placement.headers.safetensors import StoredTensor, index_files, read_safetensors
from placement.hf_config import model_from_config

INDEX = "model.safetensors.index.json"
_FULL: Mapping[str, Precision] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
# general.file_type (llama.h llama_ftype) where the name is not just the type's
_FILE_TYPES: Mapping[int, str] = {
    0: "fp32", 1: "fp16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k",
    11: "q3_k_s", 12: "q3_k_m", 13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s",
    17: "q5_k_m", 18: "q6_k", 19: "iq2_xxs", 20: "iq2_xs", 21: "q2_k", 22: "iq3_xs",
    23: "iq3_xxs", 24: "iq1_s", 25: "iq4_nl", 26: "iq3_xxs", 27: "iq3_m", 28: "iq2_xs",
    29: "iq2_m", 30: "iq4_xs", 31: "iq1_m", 32: "bf16",
}  # fmt: skip


def local_model(path: Path) -> tuple[ModelSpec, GgufHeader | None]:
    """What a folder (config.json or params.json) or a `.gguf` file holds.

    The checkpoint's size is that of the tensors in the safetensors headers where there are any;
    None where the folder has only a configuration. For GGUF the header is returned as well,
    because llama.cpp places tensors one by one.

    Raises:
        ConfigError: nothing usable there, or a file is damaged.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{path}: not a model: a folder or a .gguf file is expected")
        header = merge_parts(read_gguf(LocalFile(part)) for part in split_parts(path))
        return gguf_model(path.stem, str(path), header), header
    for file in (path / "config.json", path / "params.json"):
        if file.exists():
            model = model_from_config(str(path), _read_json(file), str(path))
            tensors = folder_tensors(path, native=file.name == "params.json")
            return with_stored_sizes(model, tensors), None
    files = sorted(path.glob("*.gguf"))
    if files:
        return local_model(files[0])
    raise ConfigError(f"{path}: holds no config.json, params.json or .gguf file")


def folder_tensors(folder: Path, *, native: bool) -> tuple[StoredTensor, ...]:
    """The tensors of the checkpoint that an engine would load; empty when there is none.

    A folder may hold the weights twice: Mistral's `consolidated*` beside Hugging Face's
    `model*`. Which ones count follows from the configuration that is used.
    """
    files = sorted(folder.glob("consolidated*.safetensors")) if native else []
    index = folder / INDEX
    if not files and index.exists():
        files = [folder / name for name in index_files(_read_text(index), str(index))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ConfigError(f"{index}: {len(missing)} files are missing: {missing[0]} ...")
    files = files or sorted(folder.glob("*.safetensors"))
    return tuple(tensor for file in files for tensor in read_safetensors(LocalFile(file)))


def with_stored_sizes(model: ModelSpec, tensors: Iterable[StoredTensor]) -> ModelSpec:
    """`model` with the size, and for unquantised weights the precision, that headers show."""
    stored = tuple(tensors)
    if not stored:
        return model
    [checkpoint] = model.checkpoints
    changes: dict[str, Any] = {"size_bytes": sum(tensor.num_bytes for tensor in stored)}
    sizes: Counter[str] = Counter()
    for tensor in stored:
        sizes[tensor.dtype] += tensor.num_bytes
    most = sizes.most_common(1)[0][0]
    if most in _FULL:
        changes["precision"] = _FULL[most]
    elif most.startswith("F8") and checkpoint.precision in ("bf16", "fp16", "fp32"):
        changes["precision"] = "fp8"
    checkpoint = checkpoint.model_copy(update=changes)
    return model.model_copy(update={"checkpoints": (checkpoint,)})


def gguf_model(name: str, source: str, header: GgufHeader) -> ModelSpec:
    """A catalogue entry from a GGUF header.

    Raises:
        ConfigError: another architecture, or a number is missing or impossible.
    """
    architecture = gguf_architecture(header)
    checkpoint = Checkpoint(
        precision=_gguf_precision(header),
        format="gguf",
        source=source,
        size_bytes=sum(tensor.num_bytes for tensor in header.tensors) or None,
    )
    return ModelSpec(
        name=name,
        title=str(header.metadata.get("general.name") or name),
        architecture=architecture,
        checkpoints=(checkpoint,),
        context=architecture.max_position,
        capabilities=("chat", "completion"),
    )


def split_parts(path: Path) -> list[Path]:
    """All parts of a file called like `name-00001-of-00003.gguf`; otherwise the file alone."""
    stem, separator, total = path.stem.rpartition("-of-")
    head, dash, number = stem.rpartition("-")
    if not (separator and dash and number.isdecimal() and total.isdecimal()):
        return [path]
    parts = sorted(path.parent.glob(f"{glob.escape(head)}-*-of-{total}.gguf"))
    if len(parts) < int(total):
        raise ConfigError(f"{path}: {len(parts)} of {int(total)} parts are there")
    return parts


def _gguf_precision(header: GgufHeader) -> Precision:
    """By the file type; by the type of most bytes where that is missing or unknown."""
    known = get_args(Precision)
    named = _FILE_TYPES.get(header.metadata.get("general.file_type", -1), "")
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        sizes[tensor.dtype] += tensor.num_bytes
    most = sizes.most_common(1)[0][0] if sizes else ""
    guesses = {"F32": "fp32", "F16": "fp16", "Q4_K": "q4_k_m", "Q5_K": "q5_k_m", "Q3_K": "q3_k_m"}
    for name in (named, guesses.get(most, most.lower())):
        if name in known:
            return name  # type: ignore[return-value]
    raise ConfigError(f"{header.name}: weights of type {most or 'none'} are not supported")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not readable as JSON: {error}") from None
