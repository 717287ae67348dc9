"""How an engine is told of LoRA adapters: vLLM's two paths, which the simulated engine has too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import aiohttp

from cluster.errors import AdapterFailed, EngineSilent

TIMEOUT_S = 120.0  # to read its files, and until the engine has a moment for it
_LOADED = "has already been loaded"


@dataclass(frozen=True, slots=True)
class EngineAdapters:
    """The engine that listens at `url` and takes `api_key`."""

    url: str
    api_key: str

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load the adapter in `folder` under `name`, whatever was loaded under it before.

        Raises:
            AdapterFailed: the engine refuses.
            EngineSilent: it does not answer.
        """
        body = {"lora_name": name, "lora_path": str(folder)}
        try:
            await self._tell("load", body)
        except AdapterFailed as error:
            if _LOADED not in str(error):
                raise
            # By a call that was given up too early, of these files or of others.
            await self.unload_adapter(name)
            await self._tell("load", body)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run with it go on.

        Raises:
            AdapterFailed: the engine does not have it.
            EngineSilent: it does not answer.
        """
        await self._tell("unload", {"lora_name": name})

    async def _tell(self, verb: str, body: dict[str, str]) -> None:
        timeout = aiohttp.ClientTimeout(TIMEOUT_S)
        url = f"{self.url}/v1/{verb}_lora_adapter"
        headers = {"authorization": f"Bearer {self.api_key}"}
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
                session.post(url, json=body) as response,
            ):
                if response.status != HTTPStatus.OK:
                    raise AdapterFailed(_message_in(await response.text()))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineSilent(f"the engine did not answer: {error!r}") from error


def _message_in(body: str) -> str:
    """What an OpenAI error body says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:300]
