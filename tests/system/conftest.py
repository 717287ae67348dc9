"""One `bora up` per fleet and test session: starting one takes most of the time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from placement.catalogue import CONFIGS
from tests.system.harness import Bora, running_bora


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bora]:
    """`bora up` as the README's first command: real vLLM, two nano models."""
    state: Path = tmp_path_factory.mktemp("local") / "state"
    with running_bora(state, str(CONFIGS / "fleets" / "local.yaml")) as bora:
        bora.wait_ready()
        yield bora
