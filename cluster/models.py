"""Models that a fleet names by path or repo id instead of by a catalogue name."""

from __future__ import annotations

import json
from pathlib import Path

from placement.catalogue import Catalogue, ModelSpec
from placement.errors import ConfigError, UnknownName
from placement.fleet import FleetSpec
from placement.hf_config import model_from_config


def catalogue_for(fleet: FleetSpec, catalogue: Catalogue) -> Catalogue:
    """`catalogue`, with an entry for each of the fleet's models that is a path or a repo id.

    Raises:
        UnknownName: neither known, nor a path, nor a repo id that can be read.
        ConfigError: its configuration cannot be used.
    """
    for wanted in fleet.models:
        try:
            catalogue.model(wanted.model)
        except UnknownName as unknown:
            catalogue = catalogue.with_model(_describe(wanted.model, unknown))
    return catalogue


def _describe(name: str, unknown: UnknownName) -> ModelSpec:
    folder = Path(name)
    if folder.is_dir():
        for file in (folder / "config.json", folder / "params.json"):
            if file.exists():
                return _read(name, file)
        raise ConfigError(f"{folder}: holds neither config.json nor params.json")
    if name.count("/") == 1 and not folder.exists():
        return _read(name, _download_config(name, unknown))
    raise unknown


def _download_config(repo: str, unknown: UnknownName) -> Path:
    """The repo's configuration through huggingface_hub (never its weights)."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - half a second, rarely needed
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    problems = []
    for file in ("config.json", "params.json"):
        try:
            return Path(hf_hub_download(repo, file))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            problems.append(f"{file}: {error}".splitlines()[0])
    raise ConfigError(f"{unknown}; and as a Hugging Face repo: {'; '.join(problems)}")


def _read(name: str, file: Path) -> ModelSpec:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as JSON: {error}") from error
    return model_from_config(name, config, name)
