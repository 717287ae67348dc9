"""A candidate: one way to run a model, before it is known whether it is legal and how it performs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from placement.architecture import Architecture
from placement.calibration import Calibration
from placement.catalogue import Checkpoint, GpuType, ModelSpec, Precision
from placement.inventory import Pool
from placement.serving_features import ExpertBalance, LoraLimits
from placement.vllm_release import DEFAULT_RELEASE

GIB = 1024**3
Link = Literal["nvlink", "pcie", "pcie-no-p2p", "host"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator as a rank finds it: its type, its memory here, and the link to its peers."""

    gpu: GpuType
    memory_bytes: int | None  # visible to torch; None: nobody knows
    gpus_per_node: int
    link: Link
    kv_cache_budget_bytes: int | None = None  # `cpu`: fixed, not what is left over
    inter_node_bytes_per_s: float | None = None  # of a node, per direction; None: nobody knows
    amx: bool = False  # `cpu`: has AMX tiles, which change how vLLM caches latents

    @property
    def is_cpu(self) -> bool:
        """A share of a machine without an accelerator."""
        return self.gpu.compute_capability is None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model's checkpoint on ranks of a device, with the engine's limits.

    A replica has data x pipeline x tensor parallel ranks. Its ranks are alike (`device`), unless
    `rank_devices` names the device of each rank of a data-parallel copy, stage after stage, as vLLM
    numbers them: rank = stage x tensor_parallel_size + position in the stage.
    """

    model: ModelSpec
    checkpoint: Checkpoint
    device: Device
    engine: Literal["vllm", "llamacpp", "sim"] = "vllm"
    num_nodes: int = 1  # that the replica may spread over
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1  # copies of the attention; experts are shared out over all
    decode_context_parallel_size: int = 1  # KV cache cut along the context, within a TP group
    expert_parallel: bool = False
    enable_eplb: bool = False  # balances experts by moving and copying them
    num_redundant_experts: int = 0
    eplb: ExpertBalance | None = None  # what the fleet wants, whether it is possible or not
    lora: LoraLimits | None = None  # room for adapters
    layer_partition: tuple[int, ...] = ()  # layers of each stage; empty: as vLLM splits them
    rank_devices: tuple[Device, ...] = ()
    stage_nodes: tuple[int, ...] = ()  # on which of the replica's nodes each stage stands
    tensor_parallel_across_nodes: bool = False  # asked for in spite of the slow link
    language_model_only: bool = False  # the vision tower is not loaded
    vllm_release: str = DEFAULT_RELEASE
    max_model_len: int = 8192
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.92
    dtype: Dtype = "auto"
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    extra_args: tuple[str, ...] = ()  # of the fleet, for the engine
    calibration: Calibration = field(default=Calibration(), repr=False)

    @property
    def architecture(self) -> Architecture:
        """Of the model."""
        return self.model.architecture

    @property
    def precision(self) -> Precision:
        """Of the checkpoint."""
        return self.checkpoint.precision

    @property
    def num_ranks(self) -> int:
        """GPUs of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    def stage_devices(self, stage: int) -> tuple[Device, ...]:
        """Devices of the tensor-parallel group that runs a pipeline stage."""
        ranks = self.tensor_parallel_size
        return self.rank_devices[stage * ranks : (stage + 1) * ranks] or (self.device,)

    @property
    def element_bytes(self) -> int:
        """Bytes of an unquantised weight or activation.

        `auto` is 16 bits wide whatever the checkpoint: vLLM casts float32 checkpoints down, and
        bfloat16 to float16 where the GPU lacks it (config/model.py _resolve_auto_dtype).
        """
        return 4 if self.dtype == "float32" else 2

    @property
    def kv_element_bytes(self) -> int:
        """Bytes of one number in the KV cache."""
        return 1 if self.kv_cache_dtype == "fp8" else self.element_bytes


def device_of(pool: Pool, gpu: GpuType) -> Device:
    """What the ranks of an engine get on a node of `pool`, whose GPU type is `gpu`."""
    memory = gpu.memory_bytes
    if pool.memory_gib_per_gpu is not None:
        memory = int(pool.memory_gib_per_gpu * GIB)
    network = pool.links.inter_gbps
    budget = None
    if gpu.compute_capability is None and pool.kv_cache_gib_per_gpu is not None:
        budget = int(pool.kv_cache_gib_per_gpu * GIB)
    return Device(
        gpu=gpu,
        memory_bytes=memory,
        gpus_per_node=pool.gpus_per_node,
        link=pool.links.intra or _own_link(gpu),
        kv_cache_budget_bytes=budget,
        inter_node_bytes_per_s=None if network is None else network * 1e9 / 8,
        amx=pool.labels.get("amx", "").lower() == "true",
    )


def simulated_device(gpu: GpuType, gpus_per_node: int = 8) -> Device:
    """A node that exists only in a simulation."""
    return Device(
        gpu=gpu, memory_bytes=gpu.memory_bytes, gpus_per_node=gpus_per_node, link=_own_link(gpu)
    )


def _own_link(gpu: GpuType) -> Link:
    if gpu.compute_capability is None:
        return "host"
    if gpu.nvlink_bytes_per_s > 0:
        return "nvlink"
    return "pcie" if gpu.peer_to_peer else "pcie-no-p2p"
