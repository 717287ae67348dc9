"""What a model's engines may do beside serving it: adapters (LoRA), balanced experts (EPLB)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from placement.spec import Spec


class LoraLimits(Spec):
    """Room that an engine keeps for adapters. To change it is another shape: engines restart."""

    max_loras: PositiveInt = Field(
        default=4, description="Adapters in one batch; each takes memory on every GPU."
    )
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = Field(
        default=16, description="Of the widest adapter; memory grows with it."
    )
    max_cpu_loras: PositiveInt = Field(
        default=32, description="Adapters that an engine keeps at hand in host memory."
    )


class ExpertBalance(Spec):
    """How experts are balanced over the ranks of a replica (vLLM's EPLB)."""

    window_size: PositiveInt = Field(
        default=1000, description="Steps whose expert loads are looked at."
    )
    step_interval: PositiveInt = Field(
        default=3000, description="Steps from one rearrangement to the next."
    )
    num_redundant_experts: NonNegativeInt = Field(
        default=0,
        le=1023,
        description="Copies of busy experts in each layer, over all ranks. With the experts they "
        "must spread evenly; each takes an expert's memory.",
    )
    log_interval: NonNegativeInt = Field(
        default=100,
        description="Steps from one measurement of the balance, which `bora status` shows, to the "
        "next: each costs a synchronisation of the ranks. 0: none.",
    )
