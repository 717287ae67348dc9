"""Which weights a request may use: those of the catalogue, and those that can be made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from placement.architecture import Architecture
from placement.calibration import Calibration
from placement.candidate import Dtype
from placement.catalogue import Checkpoint, GpuType, ModelSpec, Precision
from placement.fit_answer import SizesFrom
from placement.fit_request import FitRequest
from placement.gguf_weights import GgufWeights, gguf_size_bytes, weights_by_arithmetic
from placement.plan import Rejection
from placement.weight_bytes import GGUF_BITS, UNQUANTISED, checkpoint_bytes

_DTYPES: Mapping[str, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_DERIVED_FOR_LLAMACPP: tuple[Precision, ...] = ("q8_0", "q4_k_m")


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint as an engine would load it."""

    checkpoint: Checkpoint
    size_bytes: int
    sizes_from: SizesFrom
    dtype: Dtype = "auto"
    gguf: GgufWeights | None = None  # what llama.cpp places; None: not for llama.cpp
    note: str = ""

    @property
    def precision(self) -> Precision:
        """Of the stored weights."""
        return self.checkpoint.precision


@dataclass(frozen=True, slots=True)
class Subject:
    """The model in question, and what its own files say."""

    model: ModelSpec
    gguf: GgufWeights | None = None  # sizes in the header of the only checkpoint
    from_headers: bool = False  # the checkpoint's size is that of tensors in headers


@dataclass(frozen=True, slots=True)
class Case:
    """One checkpoint of the model on the GPUs that the request names."""

    subject: Subject
    weights: Weights
    request: FitRequest
    gpu: GpuType
    calibration: Calibration = field(default=Calibration(), repr=False)

    @property
    def model(self) -> ModelSpec:
        """The model in question."""
        return self.subject.model


def weights_to_try(subject: Subject, request: FitRequest) -> tuple[Weights, ...]:
    """Checkpoints of the precision that is asked for; all, when none is.

    A precision that the model does not come in is derived where an engine can do that: GGUF formats
    and full precision for llama.cpp by conversion, FP8 by vLLM when it loads 16-bit weights, other
    full precisions by a cast.
    """
    model = subject.model
    if subject.gguf is not None:
        checkpoint = model.checkpoints[0]
        if request.precision not in (None, checkpoint.precision):
            return ()
        return (_of_gguf(model, checkpoint, subject.gguf, sizes_from="header"),)
    stored = [entry for entry in model.checkpoints if request.precision in (None, entry.precision)]
    found = [_of_checkpoint(subject, checkpoint) for checkpoint in stored]
    if request.precision is not None and not found:
        found = _derived(model, request.precision)
    if request.engine == "llamacpp" and not any(weights.gguf for weights in found):
        wanted = request.precision
        if wanted is None:
            found += _converted(model, _DERIVED_FOR_LLAMACPP)
        elif wanted in UNQUANTISED:
            found += _converted(model, (wanted,))
    return tuple(found)


def no_such_checkpoint(model: ModelSpec, request: FitRequest) -> Rejection:
    """There are no weights in that precision, and none can be made."""
    have = sorted({checkpoint.precision for checkpoint in model.checkpoints})
    return Rejection(
        shape={"model": model.name, "gpu": request.gpu, "precision": request.precision or "any"},
        rule="no-such-checkpoint",
        reason=f"{model.name} has no {request.precision} checkpoint, only {', '.join(have)}",
    )


def _of_checkpoint(subject: Subject, checkpoint: Checkpoint) -> Weights:
    model = subject.model
    sizes_from: SizesFrom = "catalogue" if checkpoint.size_bytes else "arithmetic"
    if subject.from_headers and checkpoint.size_bytes:
        sizes_from = "header"
    if checkpoint.format == "gguf" or checkpoint.precision in GGUF_BITS:
        weights = weights_by_arithmetic(model.architecture, checkpoint)
        return _of_gguf(model, checkpoint, weights, sizes_from=sizes_from)
    size = checkpoint_bytes(model.architecture, checkpoint)
    return Weights(checkpoint=checkpoint, size_bytes=size, sizes_from=sizes_from)


def _of_gguf(
    model: ModelSpec, checkpoint: Checkpoint, weights: GgufWeights, *, sizes_from: SizesFrom
) -> Weights:
    size = gguf_size_bytes(model.architecture, checkpoint)
    return Weights(checkpoint=checkpoint, size_bytes=size, sizes_from=sizes_from, gguf=weights)


def _derived(model: ModelSpec, precision: Precision) -> list[Weights]:
    full = _full_precision(model)
    if precision in GGUF_BITS:
        return _converted(model, (precision,))
    if full is None:
        return []
    if precision == "fp8":
        checkpoint = full.model_copy(
            update={
                "precision": "fp8",
                "size_bytes": None,
                "engine_args": (*full.engine_args, "--quantization", "fp8"),
            }
        )
        note = f"quantised to FP8 by vLLM while it loads {full.source}"
        return [_made(model.architecture, checkpoint, note=note)]
    if precision in UNQUANTISED:
        checkpoint = full.model_copy(update={"precision": precision, "size_bytes": None})
        note = f"{full.precision} weights cast to {precision}: no gain in accuracy"
        return [_made(model.architecture, checkpoint, dtype=_DTYPES[precision], note=note)]
    return []


def _converted(model: ModelSpec, precisions: Sequence[Precision]) -> list[Weights]:
    """GGUF files that convert_hf_to_gguf.py and llama-quantize would make."""
    found = []
    for precision in precisions:
        checkpoint = Checkpoint(
            precision=precision,
            format="gguf",
            source=f"{model.name.rsplit('/', 1)[-1]}-{precision.upper()}.gguf",
        )
        weights = weights_by_arithmetic(model.architecture, checkpoint)
        made = _of_gguf(model, checkpoint, weights, sizes_from="arithmetic")
        note = "no such GGUF is known: convert_hf_to_gguf.py and llama-quantize make one"
        found.append(Weights(checkpoint, made.size_bytes, "arithmetic", gguf=weights, note=note))
    return found


def _made(
    architecture: Architecture, checkpoint: Checkpoint, *, dtype: Dtype = "auto", note: str
) -> Weights:
    size = checkpoint_bytes(architecture, checkpoint)
    return Weights(checkpoint, size, "arithmetic", dtype=dtype, note=note)


def _full_precision(model: ModelSpec) -> Checkpoint | None:
    for checkpoint in model.checkpoints:
        if checkpoint.precision in UNQUANTISED and checkpoint.format != "gguf":
            return checkpoint
    return None
