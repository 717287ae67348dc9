"""vLLM plugin: data-parallel copies of a mixture of experts on the CPU.

Copies gather each other's tokens before their experts and share out the sums afterwards. vLLM 0.32's
CPU communicator lacks both operations for unequal numbers of tokens (`NotImplementedError` in the
first step); here they are made of those that gloo has.

The plugin (`cluster.engines.cpu_plugin`) applies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

COMMUNICATOR_MODULE = "vllm.distributed.device_communicators.cpu_communicator"


def let_copies_exchange(module: ModuleType) -> None:
    """Give the CPU communicator of `module` both operations. Doing it twice is doing it once."""
    communicator = module.CpuCommunicator
    communicator.all_gatherv = _all_gatherv
    communicator.reduce_scatterv = _reduce_scatterv


def _all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
    """The rows of all ranks, one after the other; of several tensors, of each."""
    import torch  # noqa: PLC0415

    if isinstance(input_, list):
        return [_all_gatherv(self, each, dim, sizes) for each in input_]
    rows = _rows(self, input_, dim, sizes or [input_.shape[0]] * self.world_size)
    padded = input_.new_zeros((max(rows), *input_.shape[1:]))
    padded[: input_.shape[0]] = input_
    gathered = [torch.empty_like(padded) for _ in rows]
    torch.distributed.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([part[:count] for part, count in zip(gathered, rows, strict=True)])


def _reduce_scatterv(
    self: Any, input_: Any, dim: int = -1, sizes: Sequence[int] | None = None
) -> Any:
    """This rank's rows of the sum over all ranks."""
    import torch  # noqa: PLC0415

    rows = _rows(self, input_, dim, sizes or [input_.shape[0] // self.world_size] * self.world_size)
    summed = input_.clone()
    torch.distributed.all_reduce(summed, group=self.device_group)
    first = sum(rows[: self.rank_in_group])
    return summed[first : first + rows[self.rank_in_group]].contiguous()


def _rows(communicator: Any, tensor: Any, dim: int, sizes: Sequence[int]) -> Sequence[int]:
    if dim not in (0, -tensor.dim()):
        raise NotImplementedError(f"tokens are exchanged along dimension 0, not {dim}")
    if len(sizes) != communicator.world_size:
        raise ValueError(f"{len(sizes)} sizes for {communicator.world_size} ranks")
    return sizes
