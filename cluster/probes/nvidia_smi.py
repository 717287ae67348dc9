"""Asks `nvidia-smi` of this host."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.probes.nvidia_topology import parse_pairs
from cluster.probes.nvidia_xml import UnreadableDriverOutput, parse_capabilities, parse_log
from placement.node_facts import GpuFacts, PairFacts

TIMEOUT_S = 30.0  # a driver that is being loaded takes ten


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver knows. `problem`: why it knows nothing; empty on a host without NVIDIA."""

    version: str = ""
    gpus: tuple[GpuFacts, ...] = ()
    pairs: tuple[PairFacts, ...] = ()
    problem: str = ""


def ask_driver() -> Driver:
    """All that `nvidia-smi` tells of this host's GPUs."""
    if shutil.which("nvidia-smi") is None:
        return Driver()
    try:
        listing = _ask("-L")
        version, gpus = parse_log(
            _ask("-q", "-x"),
            listing=listing,
            capabilities=parse_capabilities(
                _ask("--query-gpu=uuid,compute_cap", "--format=csv,noheader")
            ),
        )
        pairs = () if len(gpus) < 2 else parse_pairs(_ask("topo", "-m"), _ask("topo", "-p2p", "r"))
    except (_Refused, UnreadableDriverOutput) as error:
        return Driver(problem=str(error))
    return Driver(version, gpus, pairs)


class _Refused(OSError):
    """`nvidia-smi` ended with an error, or not at all."""


def _ask(*arguments: str) -> str:
    command: Sequence[str] = ("nvidia-smi", *arguments)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: in a driver that hangs it cannot end
        raise _Refused(
            f"`{' '.join(command)}` hangs: a GPU or the driver does; look in `dmesg`"
        ) from None
    if process.returncode != 0:
        said = output.strip()[-300:]
        raise _Refused(f"`{' '.join(command)}` ended with {process.returncode}: {said}")
    return output
