"""What the controller told last, on disk: a gateway that starts while it is away serves by that."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from pydantic import ValidationError

from gateway.endpoints import SyncResponse

_log = logging.getLogger(__name__)


class KeptAnswer:
    """The newest table and keys, in a file that only its owner may read: there are tokens in it.

    Several workers may share the file; each writes what all of them are told. Lives on the running
    event loop.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_suffix(f".{os.getpid()}.new")
        self._told = SyncResponse()
        self._is_stale = False  # the file
        self._writing: asyncio.Task[None] | None = None

    def read(self) -> SyncResponse | None:
        """What is there; None: nothing that can be read."""
        try:
            return SyncResponse.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            _log.warning("%s is of no use: %s", self._path, error)
            return None

    def keep(self, answer: SyncResponse) -> None:
        """Have what is new in it written beside what was told before. Nobody waits for the disk."""
        told = {"table": answer.table, "keys": answer.keys}
        news = {name: value for name, value in told.items() if value is not None}
        if not news:
            return
        self._told = self._told.model_copy(update=news)
        self._is_stale = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_while_stale())

    async def written(self) -> None:
        """Returns when all is on disk."""
        if self._writing is not None:
            await self._writing

    async def _write_while_stale(self) -> None:
        while self._is_stale:
            self._is_stale = False
            await asyncio.to_thread(self._write, self._told)

    def _write(self, told: SyncResponse) -> None:
        try:
            descriptor = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(told.model_dump_json(include={"table", "keys"}, exclude_defaults=True))
            self._new.replace(self._path)
        except OSError as error:
            _log.warning("the table is not kept for a restart: %s", error)
