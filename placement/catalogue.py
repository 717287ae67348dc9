"""The catalogue: every model and GPU type that bora knows by name, read from `configs/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from placement.architecture import Architecture
from placement.calibration import Calibration
from placement.errors import ConfigError, UnknownName
from placement.mig import MARK, mig_slice
from placement.spec import Spec, load_yaml

if TYPE_CHECKING:  # it imports this module
    from placement.gguf_weights import GgufWeights

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

Precision = Literal[
    "fp32", "bf16", "fp16", "fp8", "nvfp4", "mxfp4", "awq", "gptq",
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m",
    "iq4_xs", "iq4_nl", "q2_k", "q2_k_l", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s",
    "q4_k_m", "q4_k_l", "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q5_k_l", "q6_k", "q6_k_l", "q8_0",
]  # fmt: skip


class Checkpoint(Spec):
    """One set of weights of a model."""

    precision: Precision
    format: Literal["hf", "mistral", "gguf"] = Field(
        default="hf",
        description="Layout: Hugging Face, Mistral's params.json + consolidated, or GGUF.",
    )
    source: str = Field(
        description="Hugging Face repo id, a path, or `nano:NAME` (made on first use)."
    )
    size_bytes: PositiveInt | None = Field(
        default=None, description="Of the weight files; None: unknown."
    )
    quantised: tuple[Literal["attention", "feed_forward", "experts"], ...] | None = Field(
        default=None,
        description="Tensors in the low precision; None: as usual for it, see `weight_bytes.py`.",
    )
    quantisation_block: PositiveInt | None = Field(
        default=None,
        description="FP8: side of the square of weights with one scale; None: a whole tensor or row.",
    )
    bits_per_weight: PositiveFloat | None = Field(
        default=None, description="Of a whole GGUF file of unknown size; None: the format's."
    )
    engine_args: tuple[str, ...] = Field(
        default=(), description="vLLM flags of this layout of the weights, before the model's."
    )
    third_party: bool = Field(default=False, description="Quantised by others than the vendor.")
    note: str = ""


class VendorMemory(Spec):
    """GPU memory in GB as Mistral's documentation states it (`minGpuRam`), by precision.

    Never planned with: for some models it is the bare weights, for others weights and a context.
    """

    bf16: PositiveFloat | None = None
    fp8: PositiveFloat | None = None
    fp4: PositiveFloat | None = None
    fp4_16k: PositiveFloat | None = Field(default=None, description="With 16k tokens of context.")


class VendorFigures(Spec):
    """What vendors publish about hardware, to be shown beside our own answer as theirs."""

    min_gpu_memory_gb: VendorMemory | None = None
    statements: tuple[str, ...] = Field(default=(), description="Of model cards and recipes.")


class Draft(Spec):
    """A small model that proposes tokens to this one (speculative decoding)."""

    source: str = Field(description="Hugging Face repo id.")
    method: Literal["eagle", "dspark"]
    size_bytes: PositiveInt | None = None
    num_speculative_tokens: PositiveInt | None = None
    max_model_len: PositiveInt | None = None
    note: str = ""


class ModelSpec(Spec):
    """A catalogue entry."""

    name: str
    title: str
    architecture: Architecture
    checkpoints: tuple[Checkpoint, ...]
    context: PositiveInt = Field(description="Longest context served, tokens.")
    aliases: tuple[str, ...] = ()
    capabilities: tuple[Literal["chat", "completion", "tools", "vision", "reasoning"], ...] = ()
    loaded_by: tuple[Literal["vllm", "llamacpp"], ...] = Field(
        default=("vllm", "llamacpp"),
        description="Engines whose releases that we plan for can load this architecture alone.",
    )
    engine_args: tuple[str, ...] = Field(default=(), description="vLLM flags the model needs.")
    supports_pipeline_parallel: bool = Field(
        default=True, description="vLLM's class for it has SupportsPP."
    )
    published_parameters: PositiveInt | None = None
    published_active_parameters: PositiveInt | None = None
    released: date | None = None
    status: Literal["preview", "current", "deprecated", "retired"] | None = Field(
        default=None, description="Of the vendor's API, whatever happens to the weights."
    )
    architecture_is_guess: bool = Field(
        default=False, description="Taken from a sibling, because its own configuration is unread."
    )
    same_shape: tuple[str, ...] = Field(
        default=(), description="Repositories with other weights of this very architecture."
    )
    tokenizer: str = ""
    drafts: tuple[Draft, ...] = ()
    vendor_figures: VendorFigures | None = None
    licence: str = ""
    note: str = ""
    sources: tuple[str, ...] = ()


class GpuType(Spec):
    """One kind of accelerator. `cpu` is one too: a share of a machine that runs a rank."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    architecture: str = ""
    compute_capability: float | None = Field(
        default=None, description="e.g. 8.9; None: no CUDA device."
    )
    memory_bytes: PositiveInt | None = Field(
        default=None, description="What torch sees, not nvidia-smi. None: given by the node (cpu)."
    )
    memory_is_guess: bool = Field(
        default=False, description="Nobody's log was found; derived from nvidia-smi's total."
    )
    nvidia_smi_mib: PositiveInt | None = Field(
        default=None, description="Total as nvidia-smi prints it, more than torch sees."
    )
    memory_bandwidth_bytes_per_s: PositiveFloat
    bf16_flops: PositiveFloat
    fp8_flops: PositiveFloat | None = Field(
        default=None, description="None: no FP8 arithmetic; the weights are unpacked to 16 bits."
    )
    fp4_flops: PositiveFloat | None = Field(default=None, description="None: no NVFP4 arithmetic.")
    nvlink_bytes_per_s: NonNegativeFloat = Field(default=0.0, description="Per direction; 0: none.")
    pcie_bytes_per_s: NonNegativeFloat = 0.0
    peer_to_peer: bool = True
    mig_compute_slices: PositiveInt | None = Field(
        default=None, description="Parts that MIG cuts its arithmetic into; None: it has no MIG."
    )
    power_w: PositiveInt | None = Field(default=None, description="Thermal design power.")
    ray_accelerator_type: str | None = None
    price_per_hour: NonNegativeFloat | None = Field(default=None, description="USD, list price.")
    note: str = ""
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Models and GPU types by name, and what engines were seen to need."""

    models: Mapping[str, ModelSpec]
    gpus: Mapping[str, GpuType]
    calibration: Calibration = field(default=Calibration(), repr=False)
    gguf_weights: Mapping[str, GgufWeights] = field(default_factory=dict, repr=False)
    """By model: what the header of its only checkpoint, a `.gguf` file, says."""

    def model(self, name: str) -> ModelSpec:
        """The entry called or aliased `name` (case-insensitive).

        Raises:
            UnknownName: with the nearest names.
        """
        for model in self.models.values():
            if name.lower() in {model.name.lower(), *(alias.lower() for alias in model.aliases)}:
                return model
        raise UnknownName("model", name, self.models)

    def gpu(self, name: str) -> GpuType:
        """The GPU type called or aliased `name` (case-insensitive); `TYPE-MIG-3g.40gb` is a slice.

        Raises:
            UnknownName: with the nearest names.
        """
        whole, mark, profile = name.partition(MARK)
        if mark and (part := mig_slice(self.gpu(whole), profile)):
            return part
        for gpu in self.gpus.values():
            if name.lower() in {gpu.name.lower(), *(alias.lower() for alias in gpu.aliases)}:
                return gpu
        raise UnknownName("GPU type", name, self.gpus)

    def with_model(self, model: ModelSpec, gguf: GgufWeights | None = None) -> Catalogue:
        """A catalogue that also knows `model`, and what the header of its GGUF file says."""
        headers = self.gguf_weights if gguf is None else {**self.gguf_weights, model.name: gguf}
        return replace(self, models={**self.models, model.name: model}, gguf_weights=headers)

    def with_calibration(self, calibration: Calibration) -> Catalogue:
        """A catalogue whose memory predictions take these observations into account."""
        return replace(self, calibration=calibration)


def load_catalogue(configs: Path = CONFIGS) -> Catalogue:
    """Read `configs/models/*.yaml` and `configs/gpus/*.yaml`, one entry a file.

    Raises:
        ConfigError: a file is wrong, or two entries share a name or alias.
    """
    models = [load_yaml(path, ModelSpec) for path in sorted((configs / "models").glob("*.yaml"))]
    gpus = [load_yaml(path, GpuType) for path in sorted((configs / "gpus").glob("*.yaml"))]
    _refuse_shared_names(configs / "models", models)
    _refuse_shared_names(configs / "gpus", gpus)
    return Catalogue({model.name: model for model in models}, {gpu.name: gpu for gpu in gpus})


def _refuse_shared_names(folder: Path, entries: list[ModelSpec] | list[GpuType]) -> None:
    owners: dict[str, str] = {}
    for entry in entries:
        for name in (entry.name, *entry.aliases):
            owner = owners.setdefault(name.lower(), entry.name)
            if owner != entry.name:
                raise ConfigError(f"{folder}: {entry.name} and {owner} both answer to {name!r}")
