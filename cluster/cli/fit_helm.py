"""The best shape of `bora fit` as values of a Helm chart.

vLLM: the chart of vllm-project/production-stack (`servingEngineSpec.modelSpec`). llama.cpp has no
chart of its own: the values name image, arguments, resources and node as such charts do.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from placement.fit_answer import FitAnswer, FitShape

_GIB = 2**30
_LLAMA_IMAGE = ("ghcr.io/ggml-org/llama.cpp", "server-cuda")
_VLLM_IMAGE = ("vllm/vllm-openai", "v0.32.0")
_PLANNED = {
    "--model": 1, "--tensor-parallel-size": 1, "--pipeline-parallel-size": 1,
    "--max-model-len": 1, "--dtype": 1, "--gpu-memory-utilization": 1, "--max-num-seqs": 1,
}  # fmt: skip


def helm_values(answer: FitAnswer, shape: FitShape) -> str:
    """YAML for `helm install -f`."""
    name = re.sub(r"[^a-z0-9-]+", "-", answer.model.lower()).strip("-")[-50:].strip("-")
    values = _llamacpp(name, shape) if shape.engine == "llamacpp" else _vllm(name, shape)
    head = f"# {answer.summary}\n# GPU: {answer.gpu}\n"
    return head + str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _vllm(name: str, shape: FitShape) -> dict[str, Any]:
    repository, tag = _VLLM_IMAGE
    config: dict[str, Any] = {
        "maxModelLen": shape.max_model_len,
        "maxNumSeqs": shape.max_num_seqs,
        "dtype": shape.dtype,
        "tensorParallelSize": shape.tensor_parallel_size,
        "pipelineParallelSize": shape.pipeline_parallel_size,
        "gpuMemoryUtilization": shape.gpu_memory_utilization,
        "extraArgs": _extra(shape.engine_args),
    }
    spec = {
        "name": name,
        "repository": repository,
        "tag": tag,
        "modelURL": shape.checkpoint,
        "replicaCount": shape.replicas,
        "requestCPU": 4 * shape.gpus_per_replica,
        "requestMemory": f"{16 * shape.gpus_per_replica}Gi",
        "requestGPU": shape.gpus_per_replica,
        "pvcStorage": f"{_disk_gib(shape)}Gi",
        "vllmConfig": config,
    }
    return {"servingEngineSpec": {"modelSpec": [spec]}}


def _llamacpp(name: str, shape: FitShape) -> dict[str, Any]:
    repository, tag = _LLAMA_IMAGE
    gpus = shape.gpus_per_replica if shape.gpu_layers else 0
    memory = f"{-(-shape.host_memory_bytes // _GIB) + 1}Gi"
    resources: dict[str, Any] = {"requests": {"memory": memory}, "limits": {"memory": memory}}
    if gpus:
        resources["limits"]["nvidia.com/gpu"] = gpus
    return {
        "nameOverride": name,
        "replicaCount": shape.replicas,
        "image": {"repository": repository, "tag": tag if gpus else "server"},
        "model": {"source": shape.checkpoint, "quantization": shape.precision.upper()},
        "llamacpp": {
            "contextSize": shape.kv_cache_tokens,
            "gpuLayers": shape.gpu_layers,
            "numLayers": shape.num_layers,
            "cpuMoeLayers": shape.cpu_moe_layers,
            "parallel": shape.max_num_seqs,
            "flashAttention": True,
            "args": list(shape.engine_args),
        },
        "resources": resources,
        "persistence": {"enabled": True, "size": f"{_disk_gib(shape)}Gi"},
    }


def _disk_gib(shape: FitShape) -> int:
    """Weights and a tenth for what else a repository holds."""
    return int(shape.checkpoint_bytes * 1.1 / _GIB) + 1


def _extra(args: tuple[str, ...]) -> list[str]:
    """Flags that the chart has no key for."""
    extra, skip = [], 0
    for arg in args:
        if skip:
            skip -= 1
        elif arg in _PLANNED:
            skip = _PLANNED[arg]
        else:
            extra.append(arg)
    return extra
