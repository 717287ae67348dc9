from __future__ import annotations

import json

from placement.engine_args import engine_args, engine_environment
from placement.shape import make_shape
from tests.placement.builders import a_candidate, a_model, an_architecture, experts

MIXTURE = a_model(architecture=an_architecture(moe=experts()))


def flags(**changes: object) -> str:
    return " ".join(engine_args(a_candidate(MIXTURE, **changes)))


def test_sizes_of_one_are_not_said_but_the_tensor_parallel_size() -> None:
    text = flags()

    assert "--tensor-parallel-size 1" in text
    assert "pipeline" not in text
    assert "data-parallel" not in text
    assert "context" not in text


def test_every_kind_of_parallelism_has_its_flag() -> None:
    text = flags(
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        data_parallel_size=2,
        decode_context_parallel_size=2,
        expert_parallel=True,
        num_nodes=2,
    )

    assert "--tensor-parallel-size 4" in text
    assert "--pipeline-parallel-size 2" in text
    assert "--data-parallel-size 2 " in text
    assert "--decode-context-parallel-size 2" in text
    assert "--enable-expert-parallel" in text
    assert "--nnodes 2" in text


def test_balancing_experts_and_leaving_out_vision_have_flags() -> None:
    args = engine_args(
        a_candidate(MIXTURE, enable_eplb=True, num_redundant_experts=4, language_model_only=True)
    )

    assert "--enable-eplb" in args
    assert json.loads(args[args.index("--eplb-config") + 1]) == {"num_redundant_experts": 4}
    assert "--language-model-only" in args


def test_an_unusual_split_of_layers_goes_through_the_environment() -> None:
    split = a_candidate(pipeline_parallel_size=2, layer_partition=(3, 1))

    assert engine_environment(a_candidate()) == {}
    assert engine_environment(split) == {"VLLM_PP_LAYER_PARTITION": "3,1"}
    assert make_shape(split).engine_environment == {"VLLM_PP_LAYER_PARTITION": "3,1"}
