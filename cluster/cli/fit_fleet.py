"""The best shape of `bora fit` as a fleet file."""

from __future__ import annotations

import re
from typing import Any

import yaml

from placement.catalogue import ModelSpec
from placement.fit_answer import FitAnswer, FitShape
from placement.fleet import FleetModel

_SAME_NAMES = (
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size",
    "pipeline_parallel_size", "data_parallel_size", "expert_parallel", "gpu_memory_utilization",
    "kv_cache_dtype", "dtype",
)  # fmt: skip


def fleet_yaml(answer: FitAnswer, shape: FitShape, model: ModelSpec) -> str:
    """YAML to paste.

    Sizes of 1 and values that are the default are left out; of llama.cpp also the share of the
    memory, which is what the shape takes and no limit.
    """
    name = model.name.rsplit("/", 1)[-1].removesuffix(".gguf")
    source = shape.checkpoint if shape.checkpoint.endswith(".gguf") else answer.model
    entry: dict[str, Any] = {"name": name, "model": source, "precision": [shape.precision]}
    if shape.engine != FleetModel.model_fields["engine"].default:
        entry["engine"] = shape.engine
    for key in _SAME_NAMES:
        field = FleetModel.model_fields.get(key)
        value = getattr(shape, key)
        if field is None or value == field.default or (value in (0, 1) and value is not True):
            continue
        if key == "gpu_memory_utilization" and shape.engine == "llamacpp":
            continue
        entry[key] = value
    if shape.num_nodes > 1:
        entry["nodes_per_replica"] = shape.num_nodes
        entry["data_parallel_size"] = shape.data_parallel_size  # 1: stages over nodes, no copies
    entry["demand"] = {"requests_per_s": 1.0}
    entry["replicas"] = {"min": 1, "max": max(1, shape.replicas)}
    fleet = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "fleet"
    return _dump({"fleet": fleet, "models": [entry]})


def _dump(value: dict[str, Any]) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
