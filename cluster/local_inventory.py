"""What this machine offers, as an inventory of one node."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections import Counter

import psutil

from cluster.errors import ClusterError
from placement.catalogue import Catalogue
from placement.errors import UnknownName
from placement.inventory import Inventory, Pool

POOL = "local"
GIB = 2**30
# A CPU rank of vLLM takes about 3 GB; less than this per slot and machines start to swap.
_MIN_GIB_PER_SLOT = 4.0
_MIN_SLOTS = 4  # nano models need no core of their own, so a small machine may oversubscribe
_KV_CACHE_GIB = 1.0


def local_inventory(catalogue: Catalogue) -> Inventory:
    """This machine's GPUs, or without any its CPU as slots that each hold one rank.

    Raises:
        ClusterError: the GPUs are of different or unknown types.
    """
    names = _gpu_names()
    memory_gib = psutil.virtual_memory().total / GIB
    if not names:
        return Inventory(pools=(_cpu_pool(memory_gib),))
    if len(Counter(names)) > 1:
        raise ClusterError(
            f"this machine mixes GPU types ({', '.join(sorted(set(names)))}); describe it with "
            f"one pool a type in an inventory file"
        )
    pool = Pool(
        name=POOL,
        gpu=_gpu_type(catalogue, names[0]),
        gpus_per_node=len(names),
        host_memory_gib=round(memory_gib, 1),
        node_names=(socket.gethostname(),),
    )
    return Inventory(pools=(pool,))


def _cpu_pool(memory_gib: float) -> Pool:
    wanted = max(_MIN_SLOTS, os.cpu_count() or 1)
    slots = max(1, min(wanted, int(memory_gib / _MIN_GIB_PER_SLOT)))
    return Pool(
        name=POOL,
        gpu="cpu",
        gpus_per_node=slots,
        memory_gib_per_gpu=round(memory_gib * 0.9 / slots, 2),
        kv_cache_gib_per_gpu=_KV_CACHE_GIB,
        host_memory_gib=round(memory_gib, 1),
        price_per_gpu_hour=0.0,
        node_names=(socket.gethostname(),),
    )


def _gpu_names() -> list[str]:
    """What nvidia-smi calls each GPU of this machine; none without the driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return (
        [line.strip() for line in result.stdout.splitlines() if line.strip()]
        if result.returncode == 0
        else []
    )


def _gpu_type(catalogue: Catalogue, name: str) -> str:
    short = name.removeprefix("NVIDIA ").removeprefix("GeForce ").replace(" ", "-")
    try:
        return catalogue.gpu(short).name
    except UnknownName as error:
        raise ClusterError(f"this machine's GPU is {name!r}: {error}") from error
