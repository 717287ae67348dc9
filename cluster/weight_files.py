"""Which files of a repository an engine needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Literal

CheckpointFormat = Literal["hf", "mistral", "gguf"]

# Weights in other forms than the engines load, and pictures.
_OTHER_FORMS = (
    ".bin", ".gguf", ".h5", ".jpg", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pdf", ".png",
    ".pt", ".pth", ".webp",
)  # fmt: skip
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
    wanted = quantisation.lower().replace("-", "_")
    return sorted(
        name
        for name in names
        if name.endswith(".gguf")
        and "mmproj" not in name.lower()
        and wanted in name.lower().replace("-", "_")
    )


def _is_loaded(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        path.parts[0] not in _OTHER_FOLDERS
        and path.suffix.lower() not in _OTHER_FORMS
        and path.name != ".gitattributes"
    )
