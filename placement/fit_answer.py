"""The answer of `bora fit`: shapes that run, shapes that do not and why, and ways out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from placement.catalogue import VendorFigures
from placement.plan import GpuMemory, Rejection, Shape
from placement.spec import Spec

Verdict = Literal["fits", "tight", "offload", "does_not_fit"]
SizesFrom = Literal["header", "catalogue", "arithmetic"]


class FitShape(Shape):
    """A shape that runs, with what only `bora fit` says of it."""

    verdict: Verdict = Field(description="`tight`: runs, unless the model errs by its usual error.")
    checkpoint: str = Field(description="Where the weights come from.")
    checkpoint_bytes: int
    sizes_from: SizesFrom = Field(description="How the checkpoint's size is known.")
    gpus_per_replica: int
    replicas: int = Field(description="As many fit on the GPUs that were offered.")
    gpus: tuple[GpuMemory, ...] = Field(description="GPUs that differ; one when all are alike.")
    limit: str = Field(description="What bounds context and concurrency, with numbers.")
    wanted_context: int = Field(description="Tokens: as asked, or the model's own.")
    error_band_bytes: int = Field(default=0, description="Per GPU, that the model may err by.")
    cpu_moe_layers: int = Field(
        default=0, description="llama.cpp: layers whose experts stay in host memory."
    )


class FitAnswer(Spec):
    """Everything about one model on one set of GPUs."""

    model: str
    gpu: str
    num_gpus: int = Field(description="In a node.")
    num_nodes: int
    parameters: int
    active_parameters: int
    checkpoint_bytes: int = Field(description="Of the best shape, else of the smallest rejected.")
    sizes_from: SizesFrom
    verdict: Verdict
    best: FitShape | None
    shapes: tuple[FitShape, ...]
    rejected: tuple[Rejection, ...]
    advice: tuple[str, ...]
    summary: str = Field(description="The verdict in one sentence.")
    context: int = Field(description="The model's own, tokens.")
    price_per_hour: float | None = Field(default=None, description="Of all these GPUs, USD.")
    notes: tuple[str, ...] = ()
    vendor_figures: VendorFigures | None = Field(
        default=None, description="As the vendor publishes them; nothing follows from them."
    )


class RankedGpu(Spec):
    """A GPU type and count, and how the model runs on it."""

    gpu: str
    num_gpus: int
    verdict: Verdict
    price_per_hour: float | None = Field(default=None, description="USD; None: unknown.")
    price_per_million_output_tokens: float | None = None
    best: FitShape | None = None


class FitRanking(Spec):
    """One model on every GPU type and count, cheapest that fits first."""

    model: str
    parameters: int
    concurrency: int = Field(description="Requests at once that speed and price are given for.")
    ranking: tuple[RankedGpu, ...]
