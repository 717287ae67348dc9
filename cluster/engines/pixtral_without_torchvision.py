"""Pixtral vision towers on a machine without torchvision (CPU installations leave it out).

vLLM's Pixtral takes one pure function from transformers' image processor, whose file imports
torchvision at its top. transformers ships a twin of that file for PIL, with the same function.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

PROCESSOR = "transformers.models.pixtral.image_processing_pixtral"
TWIN = "image_processing_pil_pixtral.py"


def install() -> None:
    """Import the twin in the processor's place, unless torchvision is there."""
    if importlib.util.find_spec("torchvision") is None and not any(
        isinstance(finder, _Twin) for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _Twin())


class _Twin(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The twin under the processor's name; None for any other module."""
        del target
        if fullname != PROCESSOR or not path:
            return None
        twin = Path(path[0], TWIN)
        return importlib.util.spec_from_file_location(fullname, twin) if twin.exists() else None
