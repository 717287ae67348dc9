"""Asks `nvidia-smi` of this host."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.probes.nvidia_topology import parse_pairs
from cluster.probes.nvidia_xml import (
    UnreadableDriverOutput,
    is_log,
    parse_capabilities,
    parse_log,
)
from placement.node_facts import GpuFacts, PairFacts

TIMEOUT_S = 30.0  # a driver that is being loaded takes ten
_NO_TOOL = (
    "an NVIDIA driver is loaded, but nvidia-smi is not on the PATH: in a container set "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility; on a host install the driver's tools"
)


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver knows. `problems`: what it does not tell, and why; a host without NVIDIA has none."""

    version: str = ""
    gpus: tuple[GpuFacts, ...] = ()
    pairs: tuple[PairFacts, ...] = ()
    problems: tuple[str, ...] = ()


def ask_driver(loaded: Path = Path("/proc/driver/nvidia/version")) -> Driver:
    """All that `nvidia-smi` tells of this host's GPUs.

    Only the log is needed: what other questions do not answer (`topo` where there is no sysfs, a
    field that an old driver does not have) is a problem beside the GPUs.
    """
    if shutil.which("nvidia-smi") is None:
        return Driver(problems=(_NO_TOOL,) if loaded.exists() else ())
    problems: list[str] = []
    capability = ("--query-gpu=uuid,compute_cap", "--format=csv,noheader")
    try:
        version, gpus, said = parse_log(
            _ask("-q", "-x"),
            listing=_asked_also(problems, "-L"),
            capabilities=parse_capabilities(_asked_also(problems, *capability)),
        )
    except (_Refused, UnreadableDriverOutput) as error:
        return Driver(problems=(str(error),))
    pairs: tuple[PairFacts, ...] = ()
    if len(gpus) > 1:
        paths = _asked_also(problems, "topo", "-m")
        pairs = parse_pairs(paths, _asked_also(problems, "topo", "-p2p", "r"))
    return Driver(version, gpus, pairs, (*said, *problems))


class _Refused(OSError):
    """`nvidia-smi` ended with an error, or not at all."""


def _asked_also(problems: list[str], *arguments: str) -> str:
    """Its answer; empty where it refuses, and why is told to `problems`."""
    try:
        return _ask(*arguments)
    except _Refused as error:
        problems.append(str(error))
        return ""


def _ask(*arguments: str) -> str:
    command = ("nvidia-smi", *arguments)
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
    # With a lost GPU it ends with an error although it describes the others.
    if process.returncode != 0 and not is_log(output):
        said = output.strip()[-300:]
        raise _Refused(f"`{' '.join(command)}` ended with {process.returncode}: {said}")
    return output
