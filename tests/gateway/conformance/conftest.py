from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.gateway.conformance import engines
from tests.gateway.conformance.engines import Running


@dataclass(frozen=True, slots=True)
class Fleet:
    """A gateway and the engines behind it."""

    url: str
    engines: dict[str, Running]


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("conformance")
    with ExitStack() as stack:
        running = [
            stack.enter_context(engines.vllm(folder)),
            stack.enter_context(engines.vllm_of_vectors(folder)),
            stack.enter_context(engines.llamacpp(folder)),
        ]
        url = stack.enter_context(engines.gateway(folder, running))
        yield Fleet(url, {engine.kind: engine for engine in running})


@pytest.fixture(params=["vllm", "llamacpp"])
def engine(request: pytest.FixtureRequest, fleet: Fleet) -> Running:
    return fleet.engines[request.param]
