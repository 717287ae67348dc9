"""Models by catalogue name, path or repo id: what a fleet or a question means by a name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from cluster import checkpoints
from cluster.adapter_folder import adapter_repo
from cluster.errors import HubUnreachable, WeightsMissing
from cluster.model_cache import Wanted
from placement.catalogue import Catalogue, ModelSpec, Precision
from placement.errors import ConfigError, UnknownName
from placement.fit_checkpoints import Subject
from placement.fleet import FleetSpec
from placement.gguf_weights import weights_from_header
from placement.headers.model_files import local_model
from placement.plan import Plan, Variant

_COMMIT = re.compile(r"[0-9a-f]{40}")


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
            subject = find_subject(wanted.model, catalogue, revision=wanted.revision, partial=False)
            model = subject.model.model_copy(update={"name": wanted.model})
            catalogue = catalogue.with_model(model, subject.gguf)
    return catalogue


def find_subject(
    name: str,
    catalogue: Catalogue,
    *,
    precision: Precision | None = None,
    revision: str | None = None,
    partial: bool = True,
) -> Subject:
    """The model called `name`: an entry, a folder, a `.gguf` file or a Hugging Face repository.

    With `partial`, part of a catalogue name will do when only one entry has it. Files are read as
    far as their headers; `precision` chooses in a repository of several GGUF files,
    `revision` among the versions of a repository.

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
        return _remote(name, revision, precision)
    raise unknown


class Commits(Protocol):
    """Who knows what revisions stand for."""

    def commit(self, repo: str, revision: str) -> str:
        """The commit of `revision` now."""
        ...


def pinned(plan: Plan, running: Plan | None = None, hub: Commits | None = None) -> Plan:
    """`plan` with the commits that its revisions stand for now, so that all replicas load the same.

    Those of adapters are part of their source: `REPO@COMMIT`. `hub` is asked, by default $HF_ENDPOINT. Where it does not say, those of the `running` plan stay;
    of what it says nothing about, every node takes what it finds.
    """
    known = _commits_of(running) if running is not None else {}
    wanted = [
        (variant, checkpoint)
        for variant in plan.variants
        for checkpoint in (checkpoints.to_download(variant), *_adapters(variant).values())
        if checkpoint is not None
    ]
    known |= {
        (each.repo, each.revision): each.revision
        for _, each in wanted
        if _COMMIT.fullmatch(each.revision)
    }
    asked = {
        (each.repo, each.revision)
        for variant, each in wanted
        if not variant.model_cache.offline and not _COMMIT.fullmatch(each.revision)
    }
    if asked and os.environ.get("HF_HUB_OFFLINE", "") in ("", "0"):
        known |= _commits(asked, hub)
    return plan.model_copy(
        update={"variants": tuple(_with_commits(variant, known) for variant in plan.variants)}
    )


def _commits_of(running: Plan) -> dict[tuple[str, str], str]:
    """By repository and revision. Of an adapter only the commit is known, not what it stood for."""
    known = {}
    for variant in running.variants:
        for adapter in _adapters(variant).values():
            if _COMMIT.fullmatch(adapter.revision):
                known[adapter.repo, "main"] = adapter.revision
        if variant.commit:
            known[variant.checkpoint, variant.revision] = variant.commit
    return known


def _adapters(variant: Variant) -> dict[str, Wanted]:
    """Those that are no folders here, by name."""
    found = {
        name: adapter_repo(source)
        for name, source in variant.adapters.items()
        if not Path(source).exists()
    }
    return {name: repo for name, repo in found.items() if repo is not None}


def _with_commits(variant: Variant, known: Mapping[tuple[str, str], str]) -> Variant:
    adapters = {
        name: f"{each.repo}@{commit}"
        for name, each in _adapters(variant).items()
        if (commit := known.get((each.repo, each.revision)))
    }
    changes: dict[str, object] = {"adapters": {**variant.adapters, **adapters}} if adapters else {}
    if checkpoints.to_download(variant) is not None:
        changes["commit"] = known.get((variant.checkpoint, variant.revision), "")
    return variant.model_copy(update=changes)


def _commits(asked: Iterable[tuple[str, str]], hub: Commits | None) -> dict[tuple[str, str], str]:
    """Of those that the hub tells us; a host with a token may be told more later."""
    if hub is None:
        from cluster.hub import Hub  # noqa: PLC0415 - imports huggingface_hub

        hub = Hub(attempts=1)
    found = {}
    for repo, revision in sorted(asked):
        try:
            found[repo, revision] = hub.commit(repo, revision)
        except HubUnreachable:
            break
        except WeightsMissing:
            continue
    return found


def _local(path: Path) -> Subject:
    model, header = local_model(path)
    if header is not None:
        return Subject(model, weights_from_header(header, model.architecture), from_headers=True)
    sized = model.checkpoints[0].size_bytes is not None
    return Subject(model, from_headers=sized)


def _remote(repo: str, revision: str | None, precision: Precision | None) -> Subject:
    from cluster import model_headers  # noqa: PLC0415 - imports huggingface_hub, rarely needed

    try:
        return model_headers.remote_subject(repo, revision=revision, precision=precision)
    except ConfigError:
        cached = model_headers.cached_config(repo, revision)
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
