"""HostState: what only `bora doctor` asks of a host: limits, clock service, models, ports."""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil
from huggingface_hub import constants, get_token

from cluster.errors import PortInUse
from cluster.processes import require_free_port
from placement.spec import Spec

HUB_TIMEOUT_S = 5.0


class HostState(Spec):
    """Beside `NodeFacts`."""

    open_files: int
    shared_memory_bytes: int
    clock_synchronized: bool | None = None  # None: nobody on the host can tell
    hub: str = ""  # the model hub's URL
    hub_problem: str = ""  # empty: it answers
    hub_token: bool = False
    ports_in_use: tuple[int, ...] = ()  # of those that were asked about
    ray_running: bool = False
    cache_writable: bool = True
    niceness: int = 0  # of what asked: of Ray's workers where Ray runs, else of the login


def host_state(ports: Sequence[int] = (), cache: Path | None = None) -> HostState:
    """Of this host; of `ports` those on which something listens. Takes up to 10 s offline."""
    hub = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    return HostState(
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        shared_memory_bytes=_shared_memory_bytes(),
        clock_synchronized=_clock_synchronized(),
        hub=hub,
        hub_problem=_hub_problem(hub),
        hub_token=_has_token(),
        ports_in_use=tuple(port for port in ports if _in_use(port)),
        ray_running=any(each.info["name"] == "raylet" for each in psutil.process_iter(["name"])),
        cache_writable=cache is None or _writable(cache),
        niceness=os.nice(0),
    )


def _shared_memory_bytes() -> int:
    """The tmpfs of /dev/shm: ranks of an engine on one host talk through it."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage("/dev/shm").total  # noqa: S108 - looked at only
    return 0


def _clock_synchronized() -> bool | None:
    if shutil.which("timedatectl") is None:
        return None
    command = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        return {"yes": True, "no": False}.get(result.stdout.strip())
    return None


def _hub_problem(hub: str) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    if not hub.startswith(("http://", "https://")):
        return f"HF_ENDPOINT is no URL: {hub}"
    request = urllib.request.Request(f"{hub}/api/models?limit=1", method="HEAD")  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()  # noqa: S310 - checked above
    except urllib.error.HTTPError as error:
        return "" if error.code < 500 else f"it answers {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""


def _has_token() -> bool:
    """As the downloads look for it: HF_TOKEN, HF_TOKEN_PATH, and what `hf auth login` left."""
    with contextlib.suppress(PermissionError):  # a file of another account's is none of ours
        return bool(get_token())
    return False


def _in_use(port: int) -> bool:
    try:
        require_free_port("0.0.0.0", port, "")  # noqa: S104 - bound for a moment, never listening
    except PortInUse:
        return True
    return False


def _writable(folder: Path) -> bool:
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    return os.access(existing, os.W_OK)
