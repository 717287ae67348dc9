"""Models by catalogue name, path or repo id: what a fleet or a question means by a name."""

from __future__ import annotations

from pathlib import Path

from placement.catalogue import Catalogue, ModelSpec, Precision
from placement.errors import ConfigError, UnknownName
from placement.fit_checkpoints import Subject
from placement.fleet import FleetSpec
from placement.gguf_weights import weights_from_header
from placement.headers.model_files import local_model


def catalogue_for(fleet: FleetSpec, catalogue: Catalogue) -> Catalogue:
    """`catalogue`, with an entry for each of the fleet's models that is a path or a repo id.

    Raises:
        UnknownName: neither known, nor a path, nor a repo id that can be read.
        ConfigError: its configuration cannot be used.
    """
    for wanted in fleet.models:
        try:
            catalogue.model(wanted.model)
        except UnknownName:
            subject = find_subject(wanted.model, catalogue, partial=False)
            model = subject.model.model_copy(update={"name": wanted.model})
            catalogue = catalogue.with_model(model, subject.gguf)
    return catalogue


def find_subject(
    name: str,
    catalogue: Catalogue,
    *,
    precision: Precision | None = None,
    partial: bool = True,
) -> Subject:
    """The model called `name`: an entry, a folder, a `.gguf` file or a Hugging Face repository.

    With `partial`, part of a catalogue name will do when only one entry has it. Files are read as
    far as their headers; `precision` chooses in a repository of several GGUF files.

    Raises:
        UnknownName: none of these; with the nearest names.
        ConfigError: there is something of that name, but it cannot be used.
    """
    try:
        return Subject(catalogue.model(name))
    except UnknownName as error:
        unknown = error
    path = Path(name)
    if path.exists():
        return _local(path)
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name}: no such file or folder")
    matching = _entries_like(name, catalogue) if partial else []
    if len(matching) == 1:
        return Subject(matching[0])
    if name.count("/") == 1:
        return _remote(name, precision)
    raise unknown


def _local(path: Path) -> Subject:
    model, header = local_model(path)
    if header is not None:
        return Subject(model, weights_from_header(header, model.architecture), from_headers=True)
    sized = model.checkpoints[0].size_bytes is not None
    return Subject(model, from_headers=sized)


def _remote(repo: str, precision: Precision | None) -> Subject:
    from cluster import model_headers  # noqa: PLC0415 - imports huggingface_hub, rarely needed

    try:
        return model_headers.remote_subject(repo, precision=precision)
    except ConfigError:
        cached = model_headers.cached_config(repo)
        if cached is None:
            raise
        return Subject(cached)


def _entries_like(name: str, catalogue: Catalogue) -> list[ModelSpec]:
    wanted = name.lower()
    return [
        model
        for model in catalogue.models.values()
        if len(wanted) >= 4 and any(wanted in each.lower() for each in (model.name, *model.aliases))
    ]
