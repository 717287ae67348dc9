"""Which engine kinds there are."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.engines.adapter import Engine
from cluster.engines.llamacpp import LlamacppEngine
from cluster.engines.sim import SimEngine
from cluster.engines.vllm import VllmEngine

ENGINES: Mapping[str, Engine] = {
    "vllm": VllmEngine(),
    "llamacpp": LlamacppEngine(),
    "sim": SimEngine(),
}
