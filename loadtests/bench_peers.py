"""The gateways that `bench_gateway` compares: how each is installed and started.

Peers come from PyPI into virtual environments of their own under a cache folder, once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.tenants import KeyFile, StoredKey, Tenant, digest_of
from loadtests.load_client import KEY
from loadtests.processes import CannotRun
from placement.spec import dump_yaml

_INSTALL_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Contender:
    """A gateway. `command(python, port, engine_port, folder)` starts it."""

    name: str
    command: Callable[[Path, int, int, Path], Sequence[str]]
    requirement: str | None = None


def contenders() -> dict[str, Contender]:
    """All, by name."""
    listed = (
        Contender("bora", _bora),
        Contender("floor", _plain("floor")),
        Contender("aiohttp", _plain("aiohttp")),
        Contender("vllm-router", _router("vllm-router"), "vllm-router==0.1.17"),
        Contender("sglang-router", _router("sglang-router", "launch"), "sglang-router==0.3.2"),
        Contender("smg", _router("smg", "launch"), "smg==1.13.*"),
        Contender("litellm", _litellm, "litellm[proxy]==1.106.*"),
    )
    return {contender.name: contender for contender in listed}


def python_of(contender: Contender, cache: Path) -> Path:
    """The interpreter that has `contender`, installed now if it is not there yet.

    Raises:
        CannotRun: the installation failed.
    """
    if contender.requirement is None:
        return Path(sys.executable)
    folder = cache / contender.name
    python, mark = folder / "bin" / "python", folder / "installed"
    if not mark.exists():
        uv = Path(sys.executable).parent / "uv"
        run = [str(uv)] if uv.exists() else ["uv"]
        _install([*run, "venv", "--clear", "--python", sys.executable, str(folder)])
        _install([*run, "pip", "install", "--python", str(python), contender.requirement])
        mark.write_text(contender.requirement, encoding="utf-8")
    return python


def _install(command: Sequence[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotRun(f"not installed: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CannotRun(f"not installed: {last[:200]}")


def _bora(python: Path, port: int, engine_port: int, folder: Path) -> list[str]:
    """With everything on: the load's key is known, and has limits of every kind."""
    endpoints = folder / "endpoints.yaml"
    endpoints.write_text(
        f'endpoints: [{{model: bench, url: "http://127.0.0.1:{engine_port}",'
        " max_in_flight: 20000}]\n",
        encoding="utf-8",
    )
    tenant = Tenant(
        name="bench",
        requests_per_minute=10**9,
        tokens_per_minute=10**12,
        max_in_flight=10**6,
        budget_tokens=10**15,
        keys=(StoredKey(sha256=digest_of(KEY)),),
    )
    keys = folder / "keys.yaml"
    keys.write_text(dump_yaml(KeyFile(tenants=(tenant,))), encoding="utf-8")
    run = [str(python), "-m", "gateway", "--endpoints", str(endpoints), "--keys", str(keys)]
    return [*run, "--http-port", str(port), "--grpc-port", "0"]


def _plain(which: str) -> Callable[[Path, int, int, Path], list[str]]:
    def command(python: Path, port: int, engine_port: int, _folder: Path) -> list[str]:
        run = [str(python), "-m", "loadtests.plain_proxies", which]
        return [*run, "--port", str(port), "--engine-port", str(engine_port)]

    return command


def _router(*launch: str) -> Callable[[Path, int, int, Path], list[str]]:
    """The three Rust routers take the same flags."""

    def command(python: Path, port: int, engine_port: int, _folder: Path) -> list[str]:
        run = [str(python.parent / launch[0]), *launch[1:]]
        run += ["--host", "127.0.0.1", "--port", str(port)]
        run += ["--worker-urls", f"http://127.0.0.1:{engine_port}"]
        return [*run, "--policy", "round_robin", "--log-level", "error"]

    return command


def _litellm(python: Path, port: int, engine_port: int, folder: Path) -> list[str]:
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n- model_name: bench\n  litellm_params:\n    model: openai/bench\n"
        f"    api_base: http://127.0.0.1:{engine_port}/v1\n    api_key: any\n"
        "general_settings:\n  dangerously_permit_weak_or_unset_master_key: true\n",
        encoding="utf-8",
    )
    run = [str(python.parent / "litellm"), "--config", str(config), "--host", "127.0.0.1"]
    return [*run, "--port", str(port), "--num_workers", "1"]
