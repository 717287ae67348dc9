"""What a Hugging Face repository says of its model: configuration and headers, never the weights.

Files are read through huggingface_hub's HfFileSystem in byte ranges: of a checkpoint of hundreds of
gigabytes a few megabytes. What the local Hugging Face cache holds is not asked for again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from cluster.weight_files import names_it
from placement.catalogue import ModelSpec, Precision
from placement.errors import ConfigError
from placement.fit_checkpoints import Subject
from placement.gguf_weights import weights_from_header
from placement.headers.gguf import merge_parts, read_gguf
from placement.headers.model_files import INDEX, gguf_model, with_stored_sizes
from placement.headers.safetensors import StoredTensor, index_files, read_safetensors
from placement.hf_config import model_from_config

_LARGEST_JSON = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`ByteRanges` of a file in a repository."""

    filesystem: Any  # huggingface_hub.HfFileSystem, imported late
    name: str  # repo/path
    size_bytes: int

    def read(self, offset: int, length: int) -> bytes:
        """One range request; a `ConfigError` when the hub does not answer."""
        end = min(offset + length, self.size_bytes)
        if offset >= end:
            return b""
        try:
            data = self.filesystem.cat_file(self.name, start=offset, end=end, cache_type="none")
        except _failures() as error:
            raise ConfigError(f"{self.name}: cannot be read: {_first_line(error)}") from error
        return bytes(data)


def remote_subject(
    repo: str,
    *,
    revision: str | None = None,
    precision: Precision | None = None,
    endpoint: str | None = None,
) -> Subject:
    """The model in a repository, its sizes from the headers of its weight files.

    `revision`: a branch, a tag or a commit; None: the main branch.

    A repository of GGUF files has one for each quantisation: the one named like `precision`, or the
    only one.

    Raises:
        ConfigError: the hub cannot be reached, there is no such repository or no model in it, or
            its files are damaged.
    """
    root = repo if revision is None else f"{repo}@{quote(revision, safe='')}"
    files = _files(root, endpoint)
    by_path = {file.name.removeprefix(f"{root}/"): file for file in files}
    for config in ("config.json", "params.json"):
        if config in by_path:
            model = model_from_config(repo, _json(by_path[config]), repo)
            tensors = _tensors(by_path, native=config == "params.json")
            return Subject(with_stored_sizes(model, tensors), from_headers=bool(tensors))
    return _gguf_subject(repo, files, precision)


def cached_config(repo: str, revision: str | None = None) -> ModelSpec | None:
    """The model by its configuration in the local Hugging Face cache, or None."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - slow to import

    for name in ("config.json", "params.json"):
        path = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            try:
                config = json.loads(Path(path).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}: not readable as JSON: {error}") from None
            return model_from_config(repo, config, repo)
    return None


def _files(repo: str, endpoint: str | None) -> list[RemoteFile]:
    from huggingface_hub import HfFileSystem  # noqa: PLC0415 - slow to import, rarely needed

    try:
        filesystem = HfFileSystem(endpoint=endpoint)
        entries = filesystem.ls(repo, detail=True)
    except _failures() as error:
        raise ConfigError(
            f"{repo}: neither in the catalogue, nor a path here, nor readable as a Hugging Face "
            f"repository: {_first_line(error)}"
        ) from None
    return [
        RemoteFile(filesystem, entry["name"], entry["size"] or 0)
        for entry in entries
        if isinstance(entry, dict) and entry["type"] == "file"
    ]


def _failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises; the first base is that of its HTTP library's errors."""
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415 - slow to import

    transport = HfHubHTTPError.__bases__[0]
    return (OSError, ValueError, transport)


def _json(file: RemoteFile) -> Any:
    if file.size_bytes > _LARGEST_JSON:
        raise ConfigError(f"{file.name}: {file.size_bytes:,} bytes are no configuration")
    try:
        return json.loads(file.read(0, file.size_bytes))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file.name}: not readable as JSON: {error}") from None


def _tensors(by_path: dict[str, RemoteFile], *, native: bool) -> tuple[StoredTensor, ...]:
    """Of the checkpoint that an engine loads, where a repository holds it twice."""
    names = sorted(path for path in by_path if path.endswith(".safetensors") and "/" not in path)
    consolidated = [name for name in names if name.startswith("consolidated")]
    chosen: Sequence[str] = consolidated if native and consolidated else ()
    if not chosen and INDEX in by_path:
        index = by_path[INDEX]
        chosen = index_files(index.read(0, index.size_bytes), index.name)
    chosen = chosen or [name for name in names if name not in consolidated] or names
    missing = [name for name in chosen if name not in by_path]
    if missing:
        raise ConfigError(f"{INDEX} names {missing[0]}, which the repository does not have")
    return tuple(tensor for name in chosen for tensor in read_safetensors(by_path[name]))


def _gguf_subject(repo: str, files: list[RemoteFile], precision: Precision | None) -> Subject:
    found = sorted(
        (file for file in files if file.name.endswith(".gguf") and "mmproj" not in file.name),
        key=lambda file: file.name,
    )
    if precision is not None:
        # The repository's own name may tell a quantisation, or several.
        found = [file for file in found if names_it(file.name.split("/", 2)[-1], precision)]
    stems = {file.name.rpartition("-of-")[0].rpartition("-")[0] or file.name for file in found}
    if len(stems) != 1:
        have = ", ".join(PurePosixPath(file.name).name for file in found) or "none"
        raise ConfigError(
            f"{repo}: no config.json or params.json, and not one GGUF file but {have}: "
            f"--precision chooses"
        )
    header = merge_parts(read_gguf(file) for file in found)
    model = gguf_model(repo, repo, header)
    return Subject(model, weights_from_header(header, model.architecture), from_headers=True)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
