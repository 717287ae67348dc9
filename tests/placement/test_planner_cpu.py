"""Plans for pools of CPUs, and simulations on them."""

from __future__ import annotations

from tests.placement.builders import (
    CATALOGUE,
    a_cpu_pool,
    a_latent,
    a_model,
    a_wish,
    an_architecture,
)
from tests.placement.plans import plan_for, plan_on_cpu, the_only


def test_a_small_model_gets_one_slot_of_a_cpu_pool() -> None:
    variant = the_only(plan_on_cpu())

    assert variant.variant == "chat@local-tp1"
    assert variant.gpu == "cpu"
    assert [[(node.node, node.gpus) for node in gpus] for gpus in variant.placement] == [
        [("local-0", (0,))]
    ]
    assert variant.shape.kv_cache_tokens == 524_288
    assert (variant.shape.max_num_seqs, variant.shape.max_num_batched_tokens) == (32, 2048)
    assert variant.shape.max_model_len == 8192


def test_latents_on_a_cpu_need_steps_that_hold_whole_prompts() -> None:
    model = a_model(architecture=an_architecture(mla=a_latent(), head_dim=192))

    variant = the_only(plan_on_cpu(a_wish(max_model_len=4096), model))
    short = the_only(plan_on_cpu(a_wish(max_model_len=512), model))

    assert variant.shape.max_num_batched_tokens == 4096
    assert short.shape.max_num_batched_tokens == 2048


def test_a_simulation_on_a_cpu_pool_takes_one_slot_and_the_memory_of_its_gpu() -> None:
    wish = a_wish(model="mistral-large-3", engine="sim", simulate_gpu="h200")

    variant = the_only(plan_for(wish, pools=[a_cpu_pool()]))

    assert variant.gpu == "cpu"
    assert variant.simulated_gpu == "H200-SXM"
    assert variant.gpus_per_replica == 1
    assert variant.shape.num_gpus > 1
    assert variant.shape.per_gpu.total_bytes == CATALOGUE.gpu("h200").memory_bytes
    assert variant.shape.max_num_seqs == 256


def test_a_simulation_on_real_gpus_is_of_those_gpus() -> None:
    wish = a_wish(model="mistral-7b", engine="sim", simulate_gpu="h200")

    variant = the_only(plan_for(wish))

    assert variant.simulated_gpu == "H100-SXM"


def test_on_a_cpu_the_cache_is_given_in_bytes() -> None:
    args = the_only(plan_on_cpu(kv_cache_gib_per_gpu=0.5)).shape.engine_args

    assert args[args.index("--kv-cache-memory-bytes") + 1] == str(2**29)
    assert "--gpu-memory-utilization" not in args


def test_a_simulation_stands_for_as_few_gpus_as_hold_the_model() -> None:
    """Its slots cost the same whatever they stand for."""
    wish = a_wish(model="mistral-7b", engine="sim", simulate_gpu="h200")

    plan = plan_for(wish, pools=[a_cpu_pool()])

    assert the_only(plan).shape.num_gpus == 1
