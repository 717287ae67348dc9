"""`bora fit`: can this model run on these GPUs, in which shapes, and if not, why and what would help."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from placement.calibration import Calibration
from placement.catalogue import Catalogue, GpuType
from placement.fit_advice import FOUR_BITS, Asked, advise, bits_per_weight
from placement.fit_answer import FitAnswer, FitShape, Verdict
from placement.fit_checkpoints import Case, Subject, Weights, no_such_checkpoint, weights_to_try
from placement.fit_llamacpp import llamacpp_shapes
from placement.fit_request import FitRequest
from placement.fit_summary import does_not_run, runs
from placement.fit_vllm import vllm_shapes
from placement.parameters import count_parameters
from placement.plan import Rejection

_VERDICTS: tuple[Verdict, ...] = ("fits", "tight", "offload", "does_not_fit")
_ENOUGH_CONTEXT = 32768  # tokens; beyond, engine and precision come first
_COARSE = (15.0, 8.0, FOUR_BITS)  # bits per weight: nothing lost, hardly anything, noticeably


def fit(subject: Subject, request: FitRequest, catalogue: Catalogue) -> FitAnswer:
    """Try every engine, checkpoint and parallel size that the request leaves open.

    The shapes of the answer run, best first (`preference`); everything else is in `rejected`. The
    verdict is that of the best shape. Advice was verified by asking again with the change made.

    Raises:
        UnknownName: the GPU type is not known; with the nearest names.
    """
    gpu = catalogue.gpu(request.gpu)
    weights = weights_to_try(subject, request)
    shapes, rejected = _all_shapes(
        subject, request, gpu, weights, calibration=catalogue.calibration
    )
    if not weights:
        rejected = [no_such_checkpoint(subject.model, request)]
    best = shapes[0] if shapes else None
    verdict: Verdict = best.verdict if best else "does_not_fit"
    parameters = count_parameters(subject.model.architecture)
    smallest = min(weights, key=lambda each: each.size_bytes, default=None)
    price = gpu.price_per_hour
    return FitAnswer(
        model=subject.model.name,
        gpu=gpu.name,
        num_gpus=request.num_gpus,
        num_nodes=request.num_nodes,
        parameters=parameters.total,
        active_parameters=parameters.active,
        checkpoint_bytes=best.checkpoint_bytes if best else smallest.size_bytes if smallest else 0,
        sizes_from=best.sizes_from if best else smallest.sizes_from if smallest else "arithmetic",
        verdict=verdict,
        best=best,
        shapes=tuple(shapes),
        rejected=tuple(rejected),
        advice=advise(Asked(subject, request, catalogue, find_best), best),
        summary=(
            runs(subject, request, gpu, best)
            if best
            else does_not_run(subject, request, gpu, weights=weights, rejected=rejected)
        ),
        context=subject.model.context,
        price_per_hour=None if price is None else price * request.total_gpus,
        notes=_notes(subject),
        vendor_figures=subject.model.vendor_figures,
    )


def find_best(subject: Subject, request: FitRequest, catalogue: Catalogue) -> FitShape | None:
    """The best shape alone, without reasons and advice."""
    gpu = catalogue.gpu(request.gpu)
    weights = weights_to_try(subject, request)
    shapes, _ = _all_shapes(
        subject, request, gpu, weights, calibration=catalogue.calibration, hopeless=False
    )
    return shapes[0] if shapes else None


def preference(shape: FitShape, request: FitRequest) -> tuple[object, ...]:
    """Order of the shapes, best first.

    1. fits, then tight, then offload; 2. holds the context that was asked for, or the model's own,
    of which 32,768 tokens are enough here; 3. 16 bits a weight, then 8, then 4 or more, then less;
    4. offloaded: with 4 bits or more the fastest; 5. vLLM before llama.cpp; 6. more context; 7. more bits a weight;
    8. with `--concurrency`: more output tokens per second from all GPUs together; 9. fewer GPUs a
    replica, because the others can hold more replicas; 10. no data parallelism across nodes, whose
    experts would talk over the network; fewer pipeline stages, less data parallelism, experts whole
    on their ranks; 11. more output tokens per second.
    """
    total = shape.replicas * shape.prediction.output_tokens_per_s
    bits = bits_per_weight(shape.precision)
    held = min(shape.max_model_len, shape.wanted_context)
    offloaded = shape.verdict == "offload"
    enough = shape.wanted_context if request.max_model_len else _ENOUGH_CONTEXT
    return (
        _VERDICTS.index(shape.verdict),
        -min(held, enough),
        sum(bits < least for least in (_COARSE[-1:] if offloaded else _COARSE)),
        -total if offloaded else 0,
        shape.engine != "vllm",
        -held,
        -bits,
        -total if request.concurrency else 0,
        shape.gpus_per_replica,
        shape.num_nodes > 1 and shape.data_parallel_size > 1,
        shape.pipeline_parallel_size,
        shape.data_parallel_size,
        not shape.expert_parallel,
        -total,
        shape.checkpoint,
    )


def _all_shapes(
    subject: Subject,
    request: FitRequest,
    gpu: GpuType,
    weights: Iterable[Weights],
    *,
    calibration: Calibration,
    hopeless: bool = True,
) -> tuple[list[FitShape], list[Rejection]]:
    shapes, rejected = [], []
    for each in weights:
        case = Case(subject, each, request, gpu, calibration)
        for result in _results(case, hopeless=hopeless):
            if isinstance(result, Rejection):
                rejected.append(result)
            else:
                shapes.append(result)
    shapes.sort(key=lambda shape: preference(shape, request))
    return shapes, rejected


def _results(case: Case, *, hopeless: bool) -> Iterator[FitShape | Rejection]:
    """Both engines, unless one is asked for; what only the other can load is refused by name."""
    engine = case.request.engine
    if engine != "llamacpp" and (engine == "vllm" or case.weights.gguf is None):
        yield from vllm_shapes(case, hopeless=hopeless)
    if engine != "vllm" and (engine == "llamacpp" or case.weights.gguf is not None):
        yield from llamacpp_shapes(case)


def _notes(subject: Subject) -> tuple[str, ...]:
    model = subject.model
    notes = [model.note] if model.note else []
    if model.architecture.is_draft:
        notes.insert(0, "a draft: it runs beside the model that it drafts for, not alone")
    if model.architecture_is_guess:
        notes.insert(0, "the architecture is taken from a sibling: its own configuration is unread")
    return tuple(notes)
