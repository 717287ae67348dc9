"""`bora fit MODEL` without GPUs: all GPU types and counts of one node, cheapest that fits first."""

from __future__ import annotations

from typing import Any

from placement.catalogue import Catalogue, GpuType
from placement.errors import ConfigError
from placement.fit import find_best
from placement.fit_answer import FitRanking, RankedGpu, Verdict
from placement.fit_checkpoints import Subject
from placement.fit_request import make_request
from placement.parameters import count_parameters

COUNTS = (1, 2, 4, 8)
CONCURRENCY = 32  # to compare prices a token by, unless another is asked for
_VERDICTS: tuple[Verdict, ...] = ("fits", "tight", "offload", "does_not_fit")


def rank_gpus(subject: Subject, catalogue: Catalogue, **options: Any) -> FitRanking:
    """The best shape that uses 1, 2, 4 and 8 GPUs of each type; `options` as in `make_request`.

    Order: fits, tight, offload, does not fit; then price an hour, unknown prices last; then count.

    Raises:
        ConfigError: the options contradict each other for every count.
    """
    options = {**options, "concurrency": options.get("concurrency") or CONCURRENCY}
    problem: ConfigError | None = None
    ranked = []
    for gpu in catalogue.gpus.values():
        if gpu.compute_capability is None:
            continue
        for count in COUNTS:
            try:
                ranked.append(_rank(subject, catalogue, gpu, count, options))
            except ConfigError as error:  # for instance more ranks than GPUs
                problem = error
    if not ranked and problem is not None:
        raise problem
    ranked.sort(key=_order)
    return FitRanking(
        model=subject.model.name,
        parameters=count_parameters(subject.model.architecture).total,
        concurrency=options["concurrency"],
        ranking=tuple(ranked),
    )


def _rank(
    subject: Subject, catalogue: Catalogue, gpu: GpuType, count: int, options: dict[str, Any]
) -> RankedGpu:
    request = make_request(f"{gpu.name}:{count}", **options, exact=True)
    best = find_best(subject, request, catalogue)
    price = None if gpu.price_per_hour is None else gpu.price_per_hour * request.total_gpus
    per_million = None
    if best is not None and price is not None:
        tokens_per_hour = best.replicas * best.prediction.output_tokens_per_s * 3600
        per_million = price / tokens_per_hour * 1e6
    return RankedGpu(
        gpu=gpu.name,
        num_gpus=count,
        verdict=best.verdict if best else "does_not_fit",
        price_per_hour=price,
        price_per_million_output_tokens=per_million,
        best=best,
    )


def _order(ranked: RankedGpu) -> tuple[object, ...]:
    price = ranked.price_per_hour
    return (
        _VERDICTS.index(ranked.verdict),
        price is None,
        price or 0.0,
        ranked.num_gpus,
        ranked.gpu,
    )
