from __future__ import annotations

from typing import Any

import pytest

from placement.candidate import Candidate
from placement.catalogue import Checkpoint
from placement.notes import shape_notes, weight_only
from placement.shape import make_shape
from tests.placement.builders import (
    CATALOGUE,
    a_candidate,
    a_gpu_device,
    a_latent,
    a_model,
    an_architecture,
    experts,
)

ONE_HEAD = a_model(architecture=an_architecture(num_kv_heads=1))
LATENT = a_model(architecture=an_architecture(mla=a_latent(), head_dim=192))
UNEVEN = a_model(architecture=an_architecture(moe=experts(num_experts=6)))


def in_precision(precision: str, gpu: str, **changes: Any) -> Candidate:
    model = a_model(checkpoints=(Checkpoint(precision=precision, source="x"),))
    return a_candidate(model, device=a_gpu_device(gpu), **changes)


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (in_precision("fp8", "A100-80-SXM"), "fp8 is native from compute capability 8.9"),
        (in_precision("nvfp4", "H100-SXM"), "nvfp4 is native from compute capability 10, H100-SXM"),
        (in_precision("bf16", "V100-32"), "casts the weights to float16"),
        (in_precision("fp32", "H100-SXM"), "casts float32 weights to 16 bits"),
        (
            a_candidate(
                device=a_gpu_device("RTX-4090", link="pcie-no-p2p"), tensor_parallel_size=2
            ),
            "RTX-4090 has no peer-to-peer",
        ),
        (
            a_candidate(device=a_gpu_device("L40S", link="pcie"), tensor_parallel_size=4),
            "off for 4 GPUs on PCIe (more than 2)",
        ),
        (a_candidate(tensor_parallel_size=3), "2, 4, 6, 8 and 16 ranks, not 3"),
        (a_candidate(tensor_parallel_size=16), "cross nodes"),
        (a_candidate(LATENT, tensor_parallel_size=8), "same KV cache on all 8"),
        (a_candidate(ONE_HEAD, tensor_parallel_size=2), "1 K/V heads are copied onto 2"),
        (
            a_candidate(UNEVEN, tensor_parallel_size=4, expert_parallel=True),
            "6 experts do not spread evenly over 4",
        ),
        (
            a_candidate(
                pipeline_parallel_size=2,
                rank_devices=(a_gpu_device("H100-SXM"), a_gpu_device("L4")),
            ),
            "H100-SXM and L4",
        ),
    ],
)
def test_what_costs_speed_or_memory_is_said(candidate: Candidate, said: str) -> None:
    notes = shape_notes(candidate)

    assert any(said in note for note in notes)


@pytest.mark.parametrize(
    "candidate",
    [
        a_candidate(),
        a_candidate(tensor_parallel_size=4),
        in_precision("fp8", "L4"),
        in_precision("nvfp4", "B200"),
        a_candidate(device=a_gpu_device("L40S", link="pcie"), tensor_parallel_size=2),
        a_candidate(LATENT, tensor_parallel_size=8, decode_context_parallel_size=8),
    ],
)
def test_what_runs_well_needs_no_note(candidate: Candidate) -> None:
    assert shape_notes(candidate) == ()


def test_four_bit_integers_are_always_unpacked() -> None:
    assert weight_only(in_precision("awq", "B200"))
    assert not weight_only(in_precision("bf16", "L4"))


def test_a_shape_carries_its_notes() -> None:
    model = CATALOGUE.model("mistral-large-3")

    shape = make_shape(a_candidate(model, checkpoint=model.checkpoints[1], tensor_parallel_size=8))

    assert any("Marlin" in note for note in shape.notes)
