"""Measures this host's devices: `python -m cluster.engines.device_speeds`, JSON on stdout.

A process of its own, because it takes a context on every GPU, and because a driver that hangs must
be killable. Progress goes to stderr. Without a GPU the host's memory and gloo stand in.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import permutations
from typing import Any

import torch
from torch import distributed, multiprocessing

_MIB = 2**20
_ROUNDS = 5
_COPY_BYTES = 64 * _MIB
_REDUCE_BYTES = _MIB
_NEEDED_BYTES = 1024 * _MIB  # free on a GPU: context, buffers, NCCL
_REDUCE_TIMEOUT = timedelta(seconds=30)


def main() -> int:
    """Print what was measured; the exit status."""
    started_s = time.perf_counter()
    cuda = torch.cuda.is_available()
    answer = _gpus() if cuda else _cpu()
    answer["cuda_version"] = torch.version.cuda or ""
    answer["took_s"] = round(time.perf_counter() - started_s, 3)
    print(json.dumps(answer))  # noqa: T201 - its answer
    return 0


def _gpus() -> dict[str, Any]:
    count = torch.cuda.device_count()
    answer: dict[str, Any] = {
        "device": "cuda",
        "ranks": count,
        "gpus": [_properties(index) for index in range(count)],
        "pairs": [],
    }
    busy = [index for index in range(count) if torch.cuda.mem_get_info(index)[0] < _NEEDED_BYTES]
    if busy:
        return {**answer, "problem": f"GPU {busy} in use: nothing was timed there"}
    for index in range(count):
        _say(f"GPU {index}: copies from host memory and in its own")
        answer["gpus"][index]["host_to_device_bytes_per_s"] = _host_to_device(index)
    answer["copy_bytes_per_s"] = min(_own_copy(f"cuda:{index}") for index in range(count))
    for first, second in permutations(range(count), 2):
        _say(f"GPU {first} to GPU {second}")
        answer["pairs"].append(_pair(first, second))
    if count > 1:
        _say(f"all-reduce over {count} GPUs")
        answer["all_reduce_s"] = _all_reduce("nccl", count)
    return answer


def _cpu() -> dict[str, Any]:
    _say("copies in host memory")
    copied = _own_copy("cpu")
    _say("all-reduce over 2 processes")
    return {
        "device": "cpu",
        "ranks": 2,
        "copy_bytes_per_s": copied,
        "all_reduce_s": _all_reduce("gloo", 2),
    }


def _properties(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "uuid": f"GPU-{properties.uuid}",
        "torch_memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _host_to_device(index: int) -> float:
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
    return _rate(lambda: target.copy_(source, non_blocking=True), _COPY_BYTES, [index])


def _own_copy(device: str) -> float:
    """Bytes/s read and written."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gpus = [torch.device(device).index] if device != "cpu" else []
    return _rate(lambda: target.copy_(source), 2 * _COPY_BYTES, gpus)


def _pair(first: int, second: int) -> dict[str, Any]:
    """A copy is compared byte by byte on the host: a GPU that lies would also lie to itself."""
    generator = torch.Generator().manual_seed(first * 64 + second)
    sent = torch.randint(256, (_COPY_BYTES,), dtype=torch.uint8, generator=generator)
    source = sent.to(f"cuda:{first}")
    target = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=f"cuda:{second}")
    target.copy_(source)
    torch.cuda.synchronize(first)
    torch.cuda.synchronize(second)
    correct = bool(torch.equal(target.cpu(), sent))
    rate = _rate(lambda: target.copy_(source), _COPY_BYTES, [first, second])
    return {
        "first": first,
        "second": second,
        "peer_access": torch.cuda.can_device_access_peer(first, second),
        "copy_correct": correct,
        "copy_bytes_per_s": rate,
    }


def _rate(act: Callable[[], object], num_bytes: int, gpus: list[int]) -> float:
    """Bytes/s of the fastest of some rounds; the first one, which warms up, is not timed."""
    best_s = float("inf")
    for each in range(_ROUNDS + 1):
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        started_s = time.perf_counter()
        act()
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        if each:
            best_s = min(best_s, time.perf_counter() - started_s)
    return num_bytes / best_s


def _all_reduce(backend: str, ranks: int) -> float:
    """Seconds of the fastest all-reduce of 1 MiB over `ranks` processes of this host."""
    with tempfile.TemporaryDirectory(prefix="bora-probe-") as folder:
        multiprocessing.spawn(_reduce_as, args=(backend, ranks, folder), nprocs=ranks)
        with open(os.path.join(folder, "seconds"), encoding="utf-8") as file:  # noqa: PTH118, PTH123
            return float(file.read())


def _reduce_as(rank: int, backend: str, ranks: int, folder: str) -> None:
    # A file for the rendezvous: no port can be taken.
    distributed.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=_REDUCE_TIMEOUT,
    )
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    values = torch.ones(_REDUCE_BYTES // 4, device=device)
    gpus = [rank] if backend == "nccl" else []
    seconds = _REDUCE_BYTES / _rate(lambda: distributed.all_reduce(values), _REDUCE_BYTES, gpus)
    if rank == 0:
        with open(os.path.join(folder, "seconds"), "w", encoding="utf-8") as file:  # noqa: PTH118, PTH123
            file.write(repr(seconds))
    distributed.destroy_process_group()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress


if __name__ == "__main__":
    sys.exit(main())
