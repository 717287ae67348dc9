"""LoRA adapters in a fleet: their form, the room that engines keep for them, where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from placement.adapters import adapter_bytes
from placement.candidate import Candidate
from placement.catalogue import load_catalogue
from placement.engine_args import engine_args
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool
from placement.legality import first_rejection
from placement.memory import memory_use, stages_of
from placement.observation import observe
from placement.planner import make_plan
from placement.serving_features import LoraLimits
from tests.placement.builders import a_cpu_device, a_gpu_device

CATALOGUE = load_catalogue()
ROOM = LoraLimits()


def a_wish(**changes: Any) -> FleetModel:
    fields = {"name": "chat", "model": "nano-7b", "adapters": {"legal": "/lora/legal"}}
    return FleetModel(**{**fields, **changes})


def a_candidate(name: str = "nano-7b", **changes: Any) -> Candidate:
    model = CATALOGUE.model(name)
    fields = {"model": model, "checkpoint": model.checkpoints[0], "device": a_gpu_device()}
    return Candidate(**{**fields, "lora": ROOM, **changes})


# Sums of the tensors that vLLM 0.32 made on a CPU with bfloat16, --max-loras 4 --max-lora-rank 16.
@pytest.mark.parametrize(
    ("name", "sizes", "measured"),
    [
        ("nano-7b", {}, 5_242_880),
        ("nano-7b", {"tensor_parallel_size": 2}, 3_538_944),
        ("nano-small", {}, 4_571_136),
        ("nano-mixtral", {}, 11_603_968),
        ("nano-mixtral", {"tensor_parallel_size": 2}, 8_261_632),
        ("nano-mixtral", {"tensor_parallel_size": 2, "expert_parallel": True}, 6_688_768),
        ("nano-large-3", {}, 4_626_432),
        ("nano-large-3", {"tensor_parallel_size": 2, "expert_parallel": True}, 2_770_944),
    ],
)
def test_the_room_for_adapters_is_what_vllm_sets_aside(
    name: str, sizes: dict[str, Any], measured: int
) -> None:
    candidate = a_candidate(name, **sizes)

    assert adapter_bytes(candidate, stages_of(candidate)[0]) == measured


def test_stages_share_the_room_out() -> None:
    whole, halved = a_candidate(), a_candidate(pipeline_parallel_size=2)

    parts = [adapter_bytes(halved, stage) for stage in stages_of(halved)]

    assert sum(parts) == adapter_bytes(whole, stages_of(whole)[0])


def test_the_room_comes_out_of_the_kv_cache() -> None:
    wide = LoraLimits(max_loras=16, max_lora_rank=256)
    without, room = (memory_use(a_candidate(lora=lora)).per_gpu for lora in (None, wide))

    assert without.adapter_bytes == 0
    assert room.adapter_bytes == 16 * 256 * 40960 * 2
    assert room.kv_cache_bytes == without.kv_cache_bytes - room.adapter_bytes


def test_the_engine_gets_its_flags_only_where_there_are_adapters() -> None:
    args = engine_args(a_candidate(lora=LoraLimits(max_loras=64, max_lora_rank=32)))

    assert args[args.index("--enable-lora") + 1 :][:6] == (
        *("--max-loras", "64", "--max-lora-rank", "32"),
        *("--max-cpu-loras", "64"),  # vLLM wants no less than --max-loras
    )
    assert "--enable-lora" not in engine_args(a_candidate(lora=None))


def test_adapters_do_not_change_the_shape_so_that_engines_go_on() -> None:
    one, two = (
        a_plan_of(a_wish(adapters=adapters))
        for adapters in ({"legal": "/lora/legal"}, {"legal": "/lora/other", "medical": "a/b"})
    )

    assert one.shape == two.shape
    assert two.adapters == {"legal": "/lora/other", "medical": "a/b"}


def test_room_can_be_kept_before_the_first_adapter_comes() -> None:
    kept = a_plan_of(a_wish(adapters={}, lora=LoraLimits()))

    assert kept.shape == a_plan_of(a_wish()).shape
    assert a_plan_of(a_wish(adapters={})).shape != kept.shape


def a_plan_of(wish: FleetModel) -> Any:
    pool = Pool(
        name="here", gpu="cpu", gpus_per_node=1, memory_gib_per_gpu=6, kv_cache_gib_per_gpu=1
    )
    plan = make_plan(FleetSpec(fleet="t", models=(wish,)), Inventory(pools=(pool,)), CATALOGUE)
    [variant] = plan.variants
    return variant


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": "llamacpp"}, "adapters: engine 'llamacpp' loads no adapters; use vllm"),
        ({"adapters": {"le gal": "/x"}}, "an adapter cannot be called 'le gal'"),
        ({"adapters": {"legal": " "}}, "legal has no source"),
        (
            {"adapters": {"a": "/a", "b": "/b"}, "lora": {"max_cpu_loras": 1}},
            "2 adapters, but lora.max_cpu_loras is 1",
        ),
        ({"eplb": {}}, "vLLM moves experts without their adapters"),
        ({"lora": {"max_lora_rank": 20}}, "Input should be 1, 8, 16"),
        ({"engine_args": ("--max-loras=3",)}, "use lora.max_loras"),
        ({"engine_args": ("--lora-modules",)}, "use adapters"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        a_wish(**changes)


def test_a_name_belongs_to_one_model_or_adapter() -> None:
    other = FleetModel(name="legal", model="nano-7b")

    with pytest.raises(ValidationError, match="two models of the fleet answer to the name 'legal'"):
        FleetSpec(fleet="t", models=(a_wish(), other))


def test_adapters_on_experts_need_a_gpu() -> None:
    on_cpu = a_candidate("nano-mixtral", device=a_cpu_device())

    rejection = first_rejection(on_cpu)

    assert rejection is not None
    assert rejection.rule == "adapters-need-gpu-for-experts"
    assert first_rejection(a_candidate("nano-7b", device=a_cpu_device())) is None


def test_an_engine_that_loaded_room_for_adapters_is_as_planned() -> None:
    variant = a_plan_of(a_wish()).model_copy(update={"gpu": "H100-SXM"})
    memory = variant.shape.per_gpu

    seen = observe(
        variant,
        weights_bytes=memory.weights_bytes + memory.adapter_bytes,
        kv_cache_tokens=None,
        observed="2026-01-01",
    )

    assert memory.adapter_bytes > 0
    assert seen is None
