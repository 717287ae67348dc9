"""The file in which probed facts outlive a run: beside the state of this user's clusters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from cluster.files import replace_text
from cluster.messages import NodeList
from placement.node_facts import NodeFacts

FACTS_FILE = "nodes.json"


def kept_facts(file: Path) -> tuple[NodeFacts, ...]:
    """What was found before; nothing where the file is missing or of another version."""
    with contextlib.suppress(FileNotFoundError, ValidationError):
        return NodeList.model_validate_json(file.read_bytes()).nodes
    return ()


def keep_facts(file: Path, facts: Iterable[NodeFacts]) -> None:
    """Write what was found, for the next controller."""
    replace_text(file, NodeList(nodes=tuple(facts)).model_dump_json())
