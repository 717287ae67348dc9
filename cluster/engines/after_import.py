"""Change a module once it is imported, without importing it for that."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Change = Callable[[ModuleType], None]


def after_import(name: str, change: Change) -> None:
    """Call `change` with the module `name`: now if it is imported, else when it is, if ever.

    The same change asked for twice is made once.
    """
    if module := sys.modules.get(name):
        change(module)
    elif not any(
        isinstance(finder, AfterImport) and finder.changes(name, change) for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, AfterImport(name, change))


class AfterImport(importlib.abc.MetaPathFinder):
    """Waits in `sys.meta_path` for the module `name`."""

    def __init__(self, name: str, change: Change) -> None:
        self._name = name
        self._change = change

    def changes(self, name: str, change: Change) -> bool:
        """Whether this is the hook for that change of that module."""
        return (self._name, self._change) == (name, change)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, with a loader that changes it after it has run."""
        del path, target
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                self._change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
