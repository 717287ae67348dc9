"""NodeFacts: what a node really has, as probes found it. Values only; `cluster/probes/` fills them."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from placement.spec import Spec


class MigSlice(Spec):
    """A part of a GPU that MIG makes look like a GPU of its own."""

    profile: str = Field(description="e.g. 3g.40gb; empty: the driver did not tell.")
    uuid: str
    memory_bytes: int


class GpuFacts(Spec):
    """One GPU as the driver describes it, and as torch sees it where that was measured."""

    index: int
    name: str = Field(description="The driver's product name.")
    uuid: str
    memory_bytes: int = Field(description="As nvidia-smi prints it: more than torch sees.")
    torch_memory_bytes: int | None = Field(default=None, description="Measured; None: not yet.")
    used_bytes: int = 0
    compute_capability: str = ""
    pcie_max_generation: int | None = Field(
        default=None, description="Of card and slot; the current one is lower on an idle GPU."
    )
    pcie_generation: int | None = None
    pcie_width: int | None = None
    pcie_max_width: int | None = None
    ecc: bool | None = Field(default=None, description="None: the card has none.")
    uncorrected_errors: int = Field(default=0, description="Since the driver was loaded.")
    remapping: str = Field(default="", description="`pending` or `failed`; empty: rows are fine.")
    mig: bool = False
    mig_slices: tuple[MigSlice, ...] = ()
    host_to_device_bytes_per_s: float | None = None

    @property
    def seen_bytes(self) -> int:
        """Memory as far as it is known: torch's, else the driver's."""
        return self.torch_memory_bytes or self.memory_bytes


class PairFacts(Spec):
    """Two GPUs of a node: how they are joined, and whether copies between them are right."""

    first: int
    second: int
    path: str = Field(default="", description="`nvidia-smi topo -m`: NV12, PIX, PHB, SYS ...")
    peer: str = Field(default="", description="`nvidia-smi topo -p2p r`: OK, CNS, NS ...")
    copy_correct: bool | None = Field(default=None, description="Measured; None: not.")
    copy_bytes_per_s: float | None = None


class NicFacts(Spec):
    """A network interface or InfiniBand port that is up."""

    name: str
    gbps: float | None = Field(default=None, description="None: the driver does not tell.")


class DiskFacts(Spec):
    """The file system of the model cache."""

    path: str
    total_bytes: int
    free_bytes: int
    read_bytes_per_s: float | None = Field(default=None, description="Past the page cache.")
    cached: Mapping[str, int] = Field(
        default_factory=dict, description="Bytes by Hugging Face repo id that lie there already."
    )


class Measured(Spec):
    """What a short run on the devices showed."""

    device: str = Field(description="`cuda` or `cpu`.")
    ranks: int
    all_reduce_s: float | None = Field(default=None, description="Of 1 MiB over all ranks.")
    copy_bytes_per_s: float | None = Field(
        default=None, description="In one device's memory; on `cpu` the host's."
    )
    took_s: float
    problem: str = Field(default="", description="Why something is missing.")


class NodeFacts(Spec):
    """All that is known of a node. `None` and empty values are unknown, never zero."""

    node: str = Field(description="As inventory and plan call it.")
    host: str = Field(description="As the host calls itself.")
    pool: str = ""
    address: str = ""
    labels: Mapping[str, str] = Field(default_factory=dict)
    driver: str = Field(default="", description="Version; empty: none answers.")
    gpus: tuple[GpuFacts, ...] = ()
    pairs: tuple[PairFacts, ...] = ()
    host_memory_bytes: int
    cpu: str = ""
    cores: int = 0
    cpu_features: tuple[str, ...] = ()
    disk: DiskFacts | None = None
    nics: tuple[NicFacts, ...] = ()
    versions: Mapping[str, str] = Field(
        default_factory=dict, description="Of python, bora, ray, vllm, torch, cuda, xllamacpp."
    )
    clock_offset_s: float | None = Field(
        default=None, description="This node's clock before (+) or behind the asking one's."
    )
    clock_error_s: float = Field(default=0.0, description="How far the offset may be wrong.")
    measured: Measured | None = None
    problems: tuple[str, ...] = Field(default=(), description="What could not be looked at.")
    probed_at_s: float = 0.0
