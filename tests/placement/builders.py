"""Values to plan with; every builder takes changes."""

from __future__ import annotations

from typing import Any

from placement.architecture import Architecture, MixtureOfExperts, MultiheadLatentAttention
from placement.candidate import GIB, Candidate, Device
from placement.catalogue import Catalogue, Checkpoint, GpuType, ModelSpec, load_catalogue
from placement.fleet import FleetModel, FleetSpec
from placement.inventory import Inventory, Pool

CATALOGUE = load_catalogue()


def an_architecture(**changes: Any) -> Architecture:
    """A dense model of four layers with grouped queries."""
    fields: dict[str, Any] = {
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 32,
        "intermediate_size": 512,
        "vocab_size": 32000,
        "max_position": 32768,
    }
    return Architecture(**{**fields, **changes})


def experts(**changes: Any) -> MixtureOfExperts:
    fields = {"num_experts": 8, "num_experts_per_token": 2, "expert_intermediate_size": 512}
    return MixtureOfExperts(**{**fields, **changes})


def a_latent() -> MultiheadLatentAttention:
    """Mistral Large 3's latent, on a small model."""
    return MultiheadLatentAttention(
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )


def a_model(
    name: str = "nano", architecture: Architecture | None = None, **changes: Any
) -> ModelSpec:
    fields: dict[str, Any] = {
        "name": name,
        "title": name,
        "architecture": architecture or an_architecture(),
        "checkpoints": (Checkpoint(precision="bf16", source=f"nano:{name}"),),
        "context": 32768,
    }
    return ModelSpec(**{**fields, **changes})


def a_catalogue(*models: ModelSpec) -> Catalogue:
    """The real GPU types, and `models` instead of the real ones."""
    return Catalogue({model.name: model for model in models or (a_model(),)}, CATALOGUE.gpus)


def a_gpu(name: str = "H100-SXM") -> GpuType:
    return CATALOGUE.gpu(name)


def a_gpu_device(name: str = "H100-SXM", **changes: Any) -> Device:
    gpu = a_gpu(name)
    fields: dict[str, Any] = {
        "gpu": gpu,
        "memory_bytes": gpu.memory_bytes,
        "gpus_per_node": 8,
        "link": "nvlink",
    }
    return Device(**{**fields, **changes})


def a_cpu_device(**changes: Any) -> Device:
    """A slot of 4 GiB with 1 GiB of KV cache."""
    fields: dict[str, Any] = {
        "gpu": a_gpu("cpu"),
        "memory_bytes": 4 * GIB,
        "gpus_per_node": 4,
        "link": "host",
        "kv_cache_budget_bytes": GIB,
    }
    return Device(**{**fields, **changes})


def a_candidate(model: ModelSpec | None = None, **changes: Any) -> Candidate:
    """`model` in its first checkpoint on one H100."""
    model = model or a_model()
    fields: dict[str, Any] = {
        "model": model,
        "checkpoint": model.checkpoints[0],
        "device": a_gpu_device(),
    }
    return Candidate(**{**fields, **changes})


def a_cpu_candidate(model: ModelSpec | None = None, **changes: Any) -> Candidate:
    fields: dict[str, Any] = {
        "device": a_cpu_device(),
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,
    }
    return a_candidate(model, **{**fields, **changes})


def a_fleet(*models: FleetModel, **changes: Any) -> FleetSpec:
    return FleetSpec(fleet="demo", models=models or (a_wish(),), **changes)


def a_wish(name: str = "chat", model: str = "nano", **changes: Any) -> FleetModel:
    return FleetModel(name=name, model=model, **changes)


def a_pool(name: str = "h100", gpu: str = "H100-SXM", **changes: Any) -> Pool:
    return Pool(name=name, gpu=gpu, **{"gpus_per_node": 8, **changes})


def a_cpu_pool(name: str = "local", **changes: Any) -> Pool:
    fields = {"gpus_per_node": 4, "memory_gib_per_gpu": 4.0, "kv_cache_gib_per_gpu": 1.0}
    return Pool(name=name, gpu="cpu", **{**fields, **changes})


def an_inventory(*pools: Pool) -> Inventory:
    return Inventory(pools=pools or (a_pool(),))
