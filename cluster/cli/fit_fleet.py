"""The best shape of `bora fit` as a fleet file, or as an endpoints file where a fleet cannot have it."""

from __future__ import annotations

import re
from typing import Any, get_args

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

    Sizes of 1 and values that are the default are left out. An engine that fleets cannot name yet
    is started by hand with the command line above, and joined by `bora gateway --endpoints`.
    """
    name = model.name.rsplit("/", 1)[-1].removesuffix(".gguf")
    if shape.engine not in get_args(FleetModel.model_fields["engine"].annotation):
        endpoint = {"model": name, "url": "http://HOST:8080", "max_in_flight": shape.max_num_seqs}
        return _dump({"endpoints": [endpoint]})
    entry: dict[str, Any] = {"name": name, "model": answer.model, "precision": [shape.precision]}
    if shape.engine != FleetModel.model_fields["engine"].default:
        entry["engine"] = shape.engine
    for key in _SAME_NAMES:
        field = FleetModel.model_fields.get(key)
        value = getattr(shape, key)
        if field is None or value == field.default or (value in (0, 1) and value is not True):
            continue
        entry[key] = value
    entry["demand"] = {"requests_per_s": 1.0}
    entry["replicas"] = {"min": 1, "max": max(1, shape.replicas)}
    fleet = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "fleet"
    return _dump({"fleet": fleet, "models": [entry]})


def _dump(value: dict[str, Any]) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
