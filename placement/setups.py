"""Setups: what has to be alike for one engine's measurements to hold for another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from placement.spec import Spec

_LIMITS = ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")


class Ranks(Protocol):
    """What a candidate and a planned shape have in common: the fields of a setup."""

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share each layer."""
        ...


class EngineSetup(Spec):
    """Weights, device and parallel sizes: what memory and speed both depend on."""

    checkpoint: str
    precision: str = Field(default="", description="Empty: of a file older than this key.")
    gpu: str
    engine: Literal["vllm", "llamacpp", "sim"]
    dtype: str
    kv_cache_dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    expert_parallel: bool

    def holds_for(self, asked: Self) -> bool:
        """Whether what was measured of this setup is true of `asked`.

        Without a precision it is, except for llama.cpp, whose repositories hold several.
        """
        if (self.checkpoint, self.gpu) != (asked.checkpoint, asked.gpu):
            return False  # a file has hundreds, and is asked for every candidate
        if self.precision or self.engine == "llamacpp":
            return self == asked
        return self == asked.model_copy(update={"precision": ""})


class Setup(EngineSetup):
    """What decides how much memory a rank has left for its KV cache, besides the memory model."""

    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float


class SpeedSetup(EngineSetup):
    """What decides how fast an engine is, besides its load and limits, which the model counts."""

    decode_context_parallel_size: int = 1
    enable_eplb: bool = False
    num_nodes: int = 1
    link: str = Field(default="", description="Between its GPUs; empty: there is only one.")
    gpu_layers: int | None = Field(default=None, description="Of llama.cpp; None: of another.")
    cpu_moe_layers: int = Field(default=0, description="Layers whose experts are in host memory.")
    threads: int | None = Field(default=None, description="Of llama.cpp on a CPU.")
    adapters: bool = Field(default=False, description="Whether it has room for LoRA adapters.")
    engine_args: str = Field(default="", description="Of the fleet, as on a command line.")

    @model_validator(mode="before")
    @classmethod
    def _without_limits(cls, given: Any) -> Any:
        """Older files have a `Setup` here."""
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if name not in _LIMITS}


def setup_of(ranks: Ranks, *, checkpoint: str, gpu: str) -> Setup:
    """The setup of a candidate or of a planned shape."""
    names = Setup.model_fields.keys() - {"checkpoint", "gpu"}
    return Setup(checkpoint=checkpoint, gpu=gpu, **{name: getattr(ranks, name) for name in names})
