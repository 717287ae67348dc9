"""What `bora fit` is asked: GPUs, what is fixed and what is left open, and the load to predict for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from placement.catalogue import Precision
from placement.errors import ConfigError, UnknownName
from placement.spec import Spec
from placement.vllm_release import DEFAULT_RELEASE

# How other tools call the two kinds of cache that are planned for.
KV_CACHE_DTYPES: Mapping[str, Literal["auto", "fp8"]] = {
    "auto": "auto", "bfloat16": "auto", "float16": "auto", "bf16": "auto", "fp16": "auto",
    "f16": "auto", "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "q8_0": "fp8",
}  # fmt: skip
_PRECISION_NAMES = {
    "float32": "fp32", "f32": "fp32", "float16": "fp16", "f16": "fp16", "half": "fp16",
    "bfloat16": "bf16", "fp8_e4m3": "fp8", "float8": "fp8", "fp4": "nvfp4", "int4": "gptq",
}  # fmt: skip


class FitRequest(Spec):
    """One question. What is None is left to bora."""

    gpu: str = Field(description="GPU type, or `cpu`.")
    num_gpus: PositiveInt = Field(default=1, le=4096, description="In a node.")
    num_nodes: PositiveInt = Field(default=1, le=1024)
    precision: Precision | None = None
    engine: Literal["vllm", "llamacpp"] | None = None
    tensor_parallel_size: PositiveInt | None = None
    pipeline_parallel_size: PositiveInt | None = None
    data_parallel_size: PositiveInt | None = None
    expert_parallel: bool | None = None
    max_model_len: PositiveInt | None = Field(default=None, description="Tokens.")
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    gpu_memory_utilization: PositiveFloat | None = Field(default=None, le=1.0)
    vllm_release: str = Field(default=DEFAULT_RELEASE, pattern=r"^\d+\.\d+(\.\d+)?$")
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    host_memory_gib: PositiveFloat | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Of a node; None: unknown, as much as is needed.",
    )
    kv_cache_gib: PositiveFloat | None = Field(
        default=None,
        allow_inf_nan=False,
        description="llama.cpp on a CPU: what the cache may take; None: one context.",
    )
    concurrency: PositiveInt | None = Field(
        default=None, description="Requests at once, over all replicas."
    )
    input_tokens: PositiveInt = 512
    output_tokens: PositiveInt = 128
    prefix_hit: NonNegativeFloat = Field(
        default=0.0, le=1.0, description="Share of prompt tokens that the prefix cache has."
    )
    acceptance_rate: NonNegativeFloat | None = Field(
        default=None, le=1.0, description="Of a draft's tokens, each; None: nothing is drafted."
    )
    num_speculative_tokens: PositiveInt | None = Field(
        default=None, le=64, description="Of a draft; None: as the model's draft wants."
    )
    host_bandwidth_gb_s: PositiveFloat | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Of a node's memory, for what llama.cpp leaves there; None: a server's 90.",
    )
    exact: bool = Field(default=False, description="Only shapes that use all the GPUs.")

    @property
    def total_gpus(self) -> int:
        """In all nodes."""
        return self.num_gpus * self.num_nodes

    @property
    def shortest_context(self) -> NonNegativeInt:
        """The least that a replica must be able to hold of one request, tokens."""
        return self.max_model_len or max(1024, self.input_tokens + self.output_tokens)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        sizes = (self.tensor_parallel_size, self.pipeline_parallel_size, self.data_parallel_size)
        ranks = 1
        for size in sizes:
            ranks *= size or 1
        if ranks > self.total_gpus:
            raise ValueError(
                f"the parallel sizes multiply to {ranks} GPUs, --gpu and --nodes give "
                f"{self.total_gpus}"
            )
        request = self.input_tokens + self.output_tokens
        asked = {"input_tokens", "output_tokens"} & self.model_fields_set
        if self.max_model_len is not None and asked and request > self.max_model_len:
            raise ValueError(
                f"a request of {self.input_tokens:,} + {self.output_tokens:,} tokens is longer "
                f"than --max-model-len {self.max_model_len:,}"
            )
        if self.gpu.lower() == "cpu" and self.host_memory_gib is None:
            raise ValueError("--gpu cpu needs --host-memory-gib: the memory is the host's")
        return self


def make_request(gpu: str, **options: Any) -> FitRequest:
    """A request from `TYPE[:COUNT]` and options as people write them; None means left open.

    Raises:
        ConfigError: an option is impossible, or two contradict each other.
        UnknownName: an unknown precision or KV-cache type, with the nearest names.
    """
    name, colon, count = gpu.partition(":")
    if colon:
        if not count.isdecimal() or not 0 < len(count) <= 6:
            raise ConfigError(f"--gpu {gpu}: TYPE:COUNT is expected, for instance H100-SXM:8")
        options["num_gpus"] = int(count)
    given = {key: value for key, value in options.items() if value is not None}
    if "precision" in given:
        given["precision"] = precision_called(given["precision"])
    if "kv_cache_dtype" in given:
        known = KV_CACHE_DTYPES.get(str(given["kv_cache_dtype"]).lower())
        if known is None:
            raise UnknownName("KV-cache type", str(given["kv_cache_dtype"]), KV_CACHE_DTYPES)
        given["kv_cache_dtype"] = known
    try:
        return FitRequest(gpu=name, **given)
    except ValidationError as error:
        raise ConfigError("; ".join(map(_problem, error.errors()))) from None


def precision_called(name: str) -> Precision:
    """The precision that people mean by `name`.

    Raises:
        UnknownName: with the nearest names.
    """
    wanted = name.strip().lower().replace("-", "_")
    wanted = _PRECISION_NAMES.get(wanted, wanted)
    for precision in get_args(Precision):
        if precision == wanted:
            return precision  # type: ignore[no-any-return]
    raise UnknownName("precision", name, get_args(Precision))


def _problem(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]).replace("_", "-")
    message = error["msg"].removeprefix("Value error, ")
    return f"--{key}: {message}, got {error['input']!r}" if key else message
