"""`bora gateway`: the gateway alone, in front of any OpenAI-compatible servers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(gateway)


def gateway(
    *,
    endpoints: Annotated[Path, typer.Option(help="YAML with the endpoints to route to.")],
    http_port: Annotated[int, typer.Option(help="0: any free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0: any free port.")] = 8001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    keys: Annotated[
        Path | None, typer.Option(help="Ask for API keys; `bora keys create --file` makes them.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the ports.")] = 1,
) -> None:
    """Route OpenAI HTTP and gRPC requests to the engines in a file, without Ray."""
    arguments = ["--endpoints", str(endpoints), "--host", host, "--http-port", str(http_port)]
    arguments += ["--grpc-port", str(grpc_port), "--workers", str(workers)]
    arguments += ["--keys", str(keys)] if keys else []
    sys.stdout.flush()
    # The same process a cluster runs: signals, exit codes and logs are its own.
    os.execv(sys.executable, [sys.executable, "-m", "gateway", *arguments])  # noqa: S606
