"""Values for tests: valid as they are, each field open to change."""

from __future__ import annotations

from typing import Any

from cluster.messages import ReplicaReport
from cluster.shape_version import shape_version
from placement.fleet import ReplicaBounds, ScalingPolicy
from placement.plan import GpuMemory, NodeGpus, Plan, Predicted, Prediction, Shape, Variant


def a_shape(**changes: Any) -> Shape:
    fields: dict[str, Any] = {
        "engine": "sim",
        "precision": "bf16",
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": 0.92,
        "per_gpu": GpuMemory(
            total_bytes=85 * 10**9,
            weights_bytes=47 * 10**9,
            activation_bytes=10**9,
            non_torch_bytes=10**8,
            cuda_graph_bytes=10**9,
            kv_cache_bytes=20 * 10**9,
            headroom_bytes=10**9,
        ),
        "kv_bytes_per_token": 163_840,
        "kv_cache_tokens": 122_064,
        "max_concurrency": 29.8,
        "num_layers": 40,
        "prediction": Prediction(ttft_s=0.05, tpot_ms=15.0, output_tokens_per_s=400.0),
    }
    return Shape(**{**fields, **changes})


def a_variant(**changes: Any) -> Variant:
    fields: dict[str, Any] = {
        "model": "chat",
        "variant": "chat@local-sim",
        "catalogue_model": "mistral-small-3.2-24b-2506",
        "checkpoint": "none",
        "pool": "local",
        "gpu": "cpu",
        "simulated_gpu": "H100-SXM",
        "shape": a_shape(),
        "replicas": 1,
        "bounds": ReplicaBounds(min=1, max=4),
        "scaling": ScalingPolicy(),
        "placement": ((NodeGpus(node="here", gpus=(0,)),),),
        "capacity_requests_per_s": 2.0,
        "predicted": Predicted(ttft_p95_s=0.1, tpot_p95_ms=20.0, utilization=0.0),
    }
    return Variant(**{**fields, **changes})


def a_plan(*variants: Variant, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "fleet": "test",
        "status": "feasible",
        "objective": 0.0,
        "bound": 0.0,
        "gap": 0.0,
        "cost_per_hour": 0.0,
        "gpus_used": len(variants),
        "gpus_total": 4,
        "variants": variants or (a_variant(),),
    }
    return Plan(**{**fields, **changes})


def a_report(**changes: Any) -> ReplicaReport:
    fields: dict[str, Any] = {
        "replica": "r1",
        "model": "chat",
        "variant": "chat@local-sim",
        "state": "ready",
        "version": shape_version(a_variant()),
        "started_s": 100.0,
        "url": "http://127.0.0.1:4000",
        "api_key": "secret",
    }
    return ReplicaReport(**{**fields, **changes})
