"""What the controller told last, on disk: a gateway that starts while it is away serves by that."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pydantic import ValidationError

from gateway.endpoints import SyncResponse

_log = logging.getLogger(__name__)


class KeptAnswer:
    """The newest table and keys, in a file that only its owner may read: there are tokens in it.

    Several workers may share the file; each writes what all of them are told.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_suffix(f".{os.getpid()}.new")
        self._told = SyncResponse()

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
        """Write what is new in it beside what was told before."""
        news = {"table": answer.table, "keys": answer.keys}
        self._told = self._told.model_copy(update={k: v for k, v in news.items() if v is not None})
        try:
            descriptor = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self._told.model_dump_json(include={"table", "keys"}))
            self._new.replace(self._path)
        except OSError as error:
            _log.warning("the table is not kept for a restart: %s", error)
