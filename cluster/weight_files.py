"""Which files of a repository an engine needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal

CheckpointFormat = Literal["hf", "mistral", "gguf", "lora"]
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there
_ADAPTER_EXTRAS = ("new_embeddings.safetensors", "new_embeddings.bin")

# Weights in other forms than the engines load, and pictures.
_OTHER_FORMS = (
    ".bin", ".gguf", ".h5", ".jpg", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pdf", ".png",
    ".pt", ".pth", ".webp",
)  # fmt: skip
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.(?:safetensors|gguf|bin))")
_OTHER_FOLDERS = ("original", "onnx", "metal", "openvino")
_CONSOLIDATED = "consolidated"


def wanted_files(
    names: Iterable[str], checkpoint_format: CheckpointFormat, precision: str = ""
) -> list[str]:
    """Of a repository's files those that a checkpoint consists of, sorted; empty: it is not there.

    Mistral's repositories hold most weights twice, as `model-*` and as `consolidated*`: only those
    of the format are wanted. `precision` chooses among GGUF files.
    """
    names = sorted(names)
    if checkpoint_format == "lora":
        return _adapter_files(names)
    if checkpoint_format == "gguf":
        return gguf_files(names, precision)
    wanted = [name for name in names if _is_loaded(name)]
    weights = [name for name in wanted if name.endswith(".safetensors")]
    mistral = [name for name in weights if PurePosixPath(name).name.startswith(_CONSOLIDATED)]
    hf = [name for name in weights if name not in mistral]
    if not weights:  # old repositories have PyTorch's own files
        pickled = [name for name in names if name.endswith(".bin") and "/" not in name]
        return sorted([*wanted, *pickled]) if pickled else []
    unwanted = hf if checkpoint_format == "mistral" and mistral else mistral if hf else []
    return [name for name in wanted if name not in unwanted]


def gguf_files(names: Iterable[str], quantisation: str) -> list[str]:
    """Those files of a repository that hold the model in this quantisation, the first part first.

    The vision tower's file (mmproj) is not the model's.
    """
    return sorted(
        name
        for name in names
        if name.endswith(".gguf") and "mmproj" not in name.lower() and names_it(name, quantisation)
    )


def names_it(file: str, quantisation: str) -> bool:
    """Whether a GGUF file's name tells this quantisation, as a whole word.

    `Q6_K_L` is another one than `Q6_K`, and `BF16` than `F16`, which fp16 is called in these names.
    """
    wanted = quantisation.lower().replace("-", "_").replace("fp", "fp?")
    pattern = rf"(?<![a-z0-9]){wanted}(?![a-z0-9]|_x*[sml](?![a-z0-9]))"
    return re.search(pattern, file.lower().replace("-", "_")) is not None


def other_parts(name: str) -> list[str]:
    """The other files of a checkpoint in parts, of which `name` is one (NAME-00001-of-00003.END)."""
    found = _PART.fullmatch(name)
    if found is None:
        return []
    start, _, count, end = found.groups()
    names = (f"{start}-{part:05}-of-{count}{end}" for part in range(1, int(count) + 1))
    return [each for each in names if each != name]


def nothing_of(checkpoint_format: CheckpointFormat, precision: str = "") -> str:
    """How it is said that a repository holds none of the files that are wanted."""
    if checkpoint_format == "lora":
        return f"no LoRA adapter: no {ADAPTER_CONFIG} with {_ADAPTER_WEIGHTS[0]} beside it is"
    kind = f"{precision} {checkpoint_format}" if precision else checkpoint_format
    return f"no {kind} checkpoint: no weights are"


def _adapter_files(names: Sequence[str]) -> list[str]:
    """Those that an engine reads; states of its training may lie beside them, and in folders."""
    weights = [name for name in _ADAPTER_WEIGHTS if name in names][:1]
    if ADAPTER_CONFIG not in names or not weights:
        return []
    return sorted([ADAPTER_CONFIG, *weights, *(name for name in _ADAPTER_EXTRAS if name in names)])


def _is_loaded(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        path.parts[0] not in _OTHER_FOLDERS
        and path.suffix.lower() not in _OTHER_FORMS
        and path.name != ".gitattributes"
    )
