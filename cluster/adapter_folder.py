"""Where a LoRA adapter's files are on this node."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cluster.errors import AdapterFailed

CONFIG = "adapter_config.json"
_FILES = (CONFIG, "adapter_model.safetensors", "adapter_model.bin", "new_embeddings.safetensors")


async def locate_adapter(source: str) -> Path:
    """The adapter's folder; a Hugging Face repository is downloaded first.

    Raises:
        AdapterFailed: there is none, or it is not an adapter.
    """
    return await asyncio.to_thread(_located, source)


def _located(source: str) -> Path:
    try:
        folder = Path(source).expanduser()
        if not folder.exists():
            if source.startswith((".", "/", "~")) or source.count("/") != 1:
                raise AdapterFailed(f"{source}: no such folder on this node")
            folder = _downloaded(source)
        if not (folder / CONFIG).is_file():
            raise AdapterFailed(f"{source}: no {CONFIG} there, so it is no LoRA adapter")
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home (~name)
        raise AdapterFailed(f"{source}: cannot be read: {error}") from error


def _downloaded(repo: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    transport: type[Exception] = HfHubHTTPError.__bases__[0]  # the HTTP library's errors
    try:
        return Path(snapshot_download(repo, allow_patterns=list(_FILES)))
    except (OSError, ValueError, transport) as error:  # ValueError: no name of a repository
        first = str(error).strip().partition("\n")[0]
        raise AdapterFailed(f"{repo}: cannot be downloaded: {first}") from error
