"""Where the endpoint table comes from: a YAML file, or the cluster's controller."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import aiohttp
from pydantic import ValidationError

from gateway.access import Access
from gateway.endpoints import (
    EndpointsFile,
    EndpointTable,
    ModelLoad,
    ServedModel,
    SyncRequest,
    SyncResponse,
)
from gateway.kept_answer import KeptAnswer
from gateway.usage_reports import UsageReports
from placement.errors import ConfigError, nearest
from placement.spec import load_yaml, place

_log = logging.getLogger(__name__)
_SYNC_WAIT_S = 0.5
_SYNC_TIMEOUT_S = 10.0
_FASTEST_SYNC_S = 0.05
_BACKOFF_S = (0.1, 2.0)
_LAST_REPORT_S = 3.0
_LAST_REPORTS = 2  # one that was not confirmed, and what came after it


class _Apply(Protocol):
    def __call__(self, table: EndpointTable, changed_s: float = 0.0) -> None:
        """Route by `table`; `changed_s` is that of `SyncResponse`."""


def table_from_file(path: Path, version: int) -> EndpointTable:
    """The table that an endpoints file describes. Models without metadata come from the endpoints.

    Raises:
        ConfigError: the file is wrong; the message says where.
    """
    listed = load_yaml(path, EndpointsFile)
    models = {model.name: model for model in listed.models}
    for endpoint in listed.endpoints:
        model = models.setdefault(endpoint.model, ServedModel(name=endpoint.model, scalable=False))
        adapters = tuple(dict.fromkeys((*model.adapters, *endpoint.adapters)))
        models[model.name] = model.model_copy(update={"adapters": adapters})
    _refuse_ambiguity(path, listed, models)
    return EndpointTable(version=version, models=tuple(models.values()), endpoints=listed.endpoints)


def _refuse_ambiguity(path: Path, listed: EndpointsFile, models: Mapping[str, ServedModel]) -> None:
    names = [model.name for model in listed.models]
    names += [name for name in models if name not in names]
    names += [alias for model in listed.models for alias in model.aliases]
    names += [name for model in models.values() for name in model.adapters]
    keys = [(endpoint.model, endpoint.key) for endpoint in listed.endpoints]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: two models answer to the name {name!r}")
    for model, key in keys:
        if keys.count((model, key)) > 1:
            raise ConfigError(f"{path}: the endpoint {key} of {model!r} stands twice")
    for number, served in enumerate(listed.models):
        _refuse_unknown_names(place(path, "models", number), listed, served, names)


def _refuse_unknown_names(
    where: str, listed: EndpointsFile, model: ServedModel, names: Sequence[str]
) -> None:
    variants = {each.variant for each in listed.endpoints if each.model == model.name}
    for variant in model.routing.weights:
        if variant not in variants:
            hint = nearest(variant, variants)
            raise ConfigError(
                f"{where}.routing.weights: no endpoint of {model.name!r} is of the variant"
                f" {variant!r}{hint}"
            )
    for name in model.fallback:
        if name not in names:
            raise ConfigError(f"{where}.fallback: there is no model {name!r}{nearest(name, names)}")


class FileFeed:
    """Follows an endpoints file. Content that is wrong is logged, and the old table kept."""

    def __init__(self, path: Path, *, poll_s: float) -> None:
        self._path = path
        self._poll_s = poll_s
        self._version = 0
        self._seen = self._stamp()

    def load(self) -> EndpointTable:
        """The table as the file is now, with the next version.

        Raises:
            ConfigError: the file is wrong.
        """
        self._seen = self._stamp()
        table = table_from_file(self._path, self._version + 1)
        self._version += 1
        return table

    async def follow(self, apply: _Apply) -> None:
        """Apply the file whenever it changes, for ever."""
        while True:
            await asyncio.sleep(self._poll_s)
            if self._stamp() == self._seen:
                continue
            try:
                table = self.load()
            except ConfigError as error:
                _log.error("endpoints file not taken, the old table stays: %s", error)
            else:
                apply(table)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


class ControllerFeed:
    """Asks the controller for newer tables, and reports load with each question.

    While none has answered since the start, what one told before it (`kept`) is in force.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        *,
        gateway_id: str,
        loads: Callable[[], Mapping[str, ModelLoad]],
        access: Access | None = None,
        kept: KeptAnswer | None = None,
    ) -> None:
        self._kept = kept
        self._url = url.rstrip("/") + "/v1/sync"
        self._headers = {"content-type": "application/json"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"
        self._gateway_id = gateway_id
        self._loads = loads
        self._version = -1
        self._access = access if access and access.required else None
        self._keys_version = -1
        self._reports = UsageReports(self._access.accounts) if self._access else None

    async def follow(self, apply: _Apply) -> None:
        """Sync for ever. While the controller is away the last table stays in force."""
        timeout = aiohttp.ClientTimeout(total=_SYNC_TIMEOUT_S, sock_connect=2.0)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session:
                await self._every_sync(lambda: self._sync(session), apply)
        finally:
            if self._kept:
                await self._kept.written()

    async def _every_sync(self, sync: Callable[[], Awaitable[SyncResponse]], apply: _Apply) -> None:
        backoff_s, failed = _BACKOFF_S[0], False
        while True:
            try:
                answer = await sync()
            except (aiohttp.ClientError, TimeoutError, OSError, ValidationError) as error:
                if not failed:
                    _log.warning("no answer from %s, the last table stays: %r", self._url, error)
                    self._recall(apply)
                failed = True
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, _BACKOFF_S[1])
                continue
            if failed:
                _log.info("%s answers again", self._url)
            backoff_s, failed = _BACKOFF_S[0], False
            if answer.table:
                apply(answer.table, answer.changed_s)
                self._version = answer.table.version
            if self._kept:
                self._kept.keep(answer)
            if answer.table is None:
                await asyncio.sleep(_FASTEST_SYNC_S)

    def _recall(self, apply: _Apply) -> None:
        told = self._kept.read() if self._kept and self._version < 0 else None
        if told is None or told.table is None:
            return
        _log.warning("what it told before this gateway started is in force")
        if self._access is not None and told.keys is not None:
            self._access.apply(told.keys.tenants)
        apply(told.table)
        self._version = told.table.version

    async def tell_last(self) -> None:
        """Report the usage that is not reported yet, if the controller is there."""
        if self._reports is None:
            return
        timeout = aiohttp.ClientTimeout(total=_LAST_REPORT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for _ in range(_LAST_REPORTS):
                if self._reports.next() is None:
                    return
                try:
                    await self._sync(session, wait_s=0.0)
                except (aiohttp.ClientError, TimeoutError, OSError, ValidationError) as error:
                    _log.error("the last usage could not be told to %s: %r", self._url, error)
                    return

    async def _sync(
        self, session: aiohttp.ClientSession, wait_s: float = _SYNC_WAIT_S
    ) -> SyncResponse:
        question = SyncRequest(
            gateway=self._gateway_id,
            version=self._version,
            wait_s=wait_s,
            loads=self._loads(),
            keys_version=self._keys_version,
            wants_keys=self._access is not None,
            usage=self._reports.next() if self._reports else None,
        )
        async with session.post(
            self._url, data=question.model_dump_json(), headers=self._headers
        ) as response:
            response.raise_for_status()
            answer = SyncResponse.model_validate_json(await response.read())
        if self._access is not None and answer.keys is not None:
            self._access.apply(answer.keys.tenants)
            self._keys_version = answer.keys.version
            _log.info("keys of %d tenants", len(answer.keys.tenants))
        if self._reports is not None:
            self._reports.answered(answer)
        return answer
