"""LoRA adapters with random weights, in PEFT's form, as tests need them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Outputs and inputs of nano-7b's projections.
NANO_7B_PROJECTIONS: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (64, 256),
    "self_attn.v_proj": (64, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (896, 256),
    "mlp.up_proj": (896, 256),
    "mlp.down_proj": (256, 896),
}


def an_adapter(
    folder: Path,
    *,
    seed: int,
    projections: Mapping[str, tuple[int, int]] = NANO_7B_PROJECTIONS,
    num_layers: int = 8,
    rank: int = 8,
    prefix: str = "base_model.model.model.layers",
) -> Path:
    """Write an adapter that changes answers a lot; returns `folder`."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(num_layers):
        for name, (outputs, inputs) in projections.items():
            at = f"{prefix}.{layer}.{name}"
            down = random.normal(0, inputs**-0.5, (rank, inputs))
            up = random.normal(0, rank**-0.5, (outputs, rank))
            tensors[f"{at}.lora_A.weight"] = down.astype(np.float32)
            tensors[f"{at}.lora_B.weight"] = up.astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "nano",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in projections}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
