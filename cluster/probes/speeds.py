"""Runs the measuring process of this host, for a bounded time, and puts its figures into facts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

from placement.node_facts import GpuFacts, Measured, NodeFacts, PairFacts

TIMEOUT_S = 120.0  # eight GPUs have 56 directions; NCCL alone takes ten seconds
GPUS_VARIABLE = "BORA_GPUS"  # of a Ray node that owns some of a box's GPUs: their UUIDs
_LAST_WORDS = 300
_END_S = 5.0


def with_speeds(
    facts: NodeFacts, progress: Callable[[str], None], timeout_s: float = TIMEOUT_S
) -> NodeFacts:
    """`facts`, with what a short run on the devices showed; with a problem where it failed."""
    # A worker without GPUs of its own is told by Ray to see none; the probe looks at all it found.
    environment = {key: value for key, value in os.environ.items() if "VISIBLE_DEVICES" not in key}
    if facts.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(_uuids(facts))
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the driver's order, as nvidia-smi's
    status, output, said = _run(environment, progress, timeout_s)
    if status is None:
        return _unmeasured(facts, f"not done within {timeout_s:.0f} s; it was at: {said}")
    if status != 0:
        return _unmeasured(facts, f"ended with {status}: {said}")
    return read(facts, output, said)


def read(facts: NodeFacts, output: str, said: str) -> NodeFacts:
    """`facts` with the figures in the last line of `output`, or with a problem where none are."""
    try:
        answer = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return _unmeasured(facts, f"printed no figures but {output[-_LAST_WORDS:]!r}: {said}")
    return merged(facts, answer)


def _uuids(facts: NodeFacts) -> list[str]:
    """Of the whole GPUs; where all are cut, of the slices: CUDA shows a process one of them."""
    whole = [gpu.uuid for gpu in facts.gpus if not gpu.mig]
    return whole or [each.uuid for gpu in facts.gpus for each in gpu.mig_slices]


def merged(facts: NodeFacts, answer: Mapping[str, Any]) -> NodeFacts:
    """`facts` with the answer of the measuring process, matched by the GPUs' UUIDs."""
    by_uuid = {gpu["uuid"]: gpu for gpu in answer.get("gpus", ())}
    place = {gpu.uuid: gpu.index for gpu in facts.gpus}
    index = {order: place.get(gpu["uuid"]) for order, gpu in enumerate(answer.get("gpus", ()))}
    cuda = {"cuda": answer["cuda_version"]} if answer.get("cuda_version") else {}
    return facts.model_copy(
        update={
            "gpus": tuple(_gpu(gpu, by_uuid.get(gpu.uuid, {})) for gpu in facts.gpus),
            "pairs": _pairs(facts, answer, index),
            "versions": {**facts.versions, **cuda},
            "measured": Measured(
                device=answer["device"],
                ranks=answer["ranks"],
                all_reduce_s=answer.get("all_reduce_s"),
                copy_bytes_per_s=answer.get("copy_bytes_per_s"),
                took_s=answer["took_s"],
                problem=answer.get("problem", ""),
            ),
        }
    )


def _gpu(gpu: GpuFacts, answer: Mapping[str, Any]) -> GpuFacts:
    keys = ("torch_memory_bytes", "compute_capability", "host_to_device_bytes_per_s")
    return gpu.model_copy(update={key: answer[key] for key in keys if key in answer})


def _pairs(
    facts: NodeFacts, answer: Mapping[str, Any], index: Mapping[int, int | None]
) -> tuple[PairFacts, ...]:
    """Both directions in one: right if both are, as fast as the slower."""
    known = {(pair.first, pair.second): pair for pair in facts.pairs}
    for each in answer.get("pairs", ()):
        ends = (index.get(each["first"]), index.get(each["second"]))
        if ends[0] is None or ends[1] is None:
            continue
        first, second = sorted(end for end in ends if end is not None)
        pair = known.get((first, second)) or PairFacts(first=first, second=second)
        rate = each["copy_bytes_per_s"]
        changes: dict[str, Any] = {
            "copy_correct": each["copy_correct"] and pair.copy_correct is not False,
            "copy_bytes_per_s": min(rate, pair.copy_bytes_per_s or rate),
        }
        if not each["peer_access"] and pair.peer in ("", "OK"):
            changes["peer"] = "CUDA says no"
        known[(first, second)] = pair.model_copy(update=changes)
    return tuple(known[key] for key in sorted(known))


def _run(
    environment: Mapping[str, str], progress: Callable[[str], None], timeout_s: float
) -> tuple[int | None, str, str]:
    """Exit status (None: killed), standard output, and the last thing it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.engines.device_speeds"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
        start_new_session=True,  # it starts ranks: all of them end together
    )
    said: list[str] = []
    printed: list[str] = []

    def listen(stream: IO[str], into: list[str], tell: Callable[[str], None]) -> None:
        with stream:
            for line in stream:
                into.append(line.strip())
                tell(line.strip())

    assert process.stdout is not None  # noqa: S101 - pipes
    assert process.stderr is not None  # noqa: S101
    listeners = [
        threading.Thread(target=listen, args=(process.stdout, printed, _drop), daemon=True),
        threading.Thread(target=listen, args=(process.stderr, said, progress), daemon=True),
    ]
    for listener in listeners:
        listener.start()
    status: int | None
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        status = None
    _kill(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)  # no longer: where a driver hangs, nothing can end the process
    for listener in listeners:
        listener.join(_END_S)
    return status, "\n".join(printed), " ".join(said)[-_LAST_WORDS:]


def _drop(text: str) -> None:
    del text


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _unmeasured(facts: NodeFacts, problem: str) -> NodeFacts:
    measured = Measured(
        device="cuda" if facts.gpus else "cpu", ranks=0, took_s=0.0, problem=problem
    )
    return facts.model_copy(
        update={"measured": measured, "problems": (*facts.problems, f"speeds: {problem}")}
    )
