"""The simulated engine's LoRA adapters: vLLM's two paths and refusals, without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.engines.sim_api import RequestRefused

LOAD_PATH = "/v1/load_lora_adapter"
UNLOAD_PATH = "/v1/unload_lora_adapter"
_CONFIG = "adapter_config.json"


class _Wish(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """`nature`: what its answers depend on."""

    path: str
    nature: str


class Adapters:
    """Those that are loaded, by name, beside the model `served`."""

    def __init__(self, served: str, max_rank: int) -> None:
        self._served = served
        self._max_rank = max_rank
        self._loaded: dict[str, Adapter] = {}

    def find(self, name: str | None) -> Adapter | None:
        """The adapter that a request means; None: the model itself.

        Raises:
            RequestRefused: there is nothing of that name.
        """
        if name in (None, self._served):
            return None
        adapter = self._loaded.get(name or "")
        if adapter is None:
            raise RequestRefused(
                f"The model `{name}` does not exist.",
                status=404,
                kind="NotFoundError",
                param="model",
            )
        return adapter

    def load(self, body: bytes) -> str:
        """Add an adapter; what vLLM says then.

        Raises:
            RequestRefused: no such adapter (404), one that is there, or a wider one (400, 500).
        """
        wish = _wish_of(body)
        if not (wish.lora_name and wish.lora_path):
            raise RequestRefused("Both 'lora_name' and 'lora_path' must be provided.")
        if wish.lora_name in self._loaded and not wish.load_inplace:
            raise RequestRefused(
                f"The lora adapter '{wish.lora_name}' has already been loaded. If you want to load "
                "the adapter in place, set 'load_inplace' to True."
            )
        try:
            nature = (Path(wish.lora_path) / _CONFIG).read_text(encoding="utf-8")
        except OSError:
            raise RequestRefused(
                f"Loading lora {wish.lora_name} failed: No adapter found for {wish.lora_path}",
                status=404,
                kind="NotFoundError",
            ) from None
        rank = json.loads(nature)["r"]
        if rank > self._max_rank:
            raise RequestRefused(
                f"Call to add_lora method failed: LoRA rank {rank} is greater than max_lora_rank "
                f"{self._max_rank}.",
                status=500,
                kind="InternalServerError",
            )
        self._loaded[wish.lora_name] = Adapter(wish.lora_path, nature)
        return f"Success: LoRA adapter '{wish.lora_name}' added successfully."

    def unload(self, body: bytes) -> str:
        """Take an adapter away; what vLLM says then. Requests that run go on with it.

        Raises:
            RequestRefused: it is not there.
        """
        wish = _wish_of(body)
        if self._loaded.pop(wish.lora_name, None) is None:
            raise RequestRefused(
                f"The lora adapter '{wish.lora_name}' cannot be found.",
                status=404,
                kind="NotFoundError",
            )
        return f"Success: LoRA adapter '{wish.lora_name}' removed successfully."

    def cards(self) -> list[dict[str, Any]]:
        """Their objects in `/v1/models`."""
        return [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "bora-sim",
                "root": adapter.path,
                "parent": self._served,
                "max_model_len": None,
            }
            for name, adapter in self._loaded.items()
        ]


def _wish_of(body: bytes) -> _Wish:
    try:
        return _Wish.model_validate_json(body)
    except ValidationError as error:
        raise RequestRefused(str(error.errors()[0]["msg"])) from None
