"""`python -m gateway`: the gateway alone. `bora gateway` is the same with more comfort."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway.config import Limits
from gateway.errors import GatewayError
from gateway.server import log_to_stderr, run
from gateway.workers import run_worker


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into text and exit codes."""
    options = _parser().parse_args(arguments)
    try:
        if options.worker:
            log_to_stderr()
            run_worker()
            return 0
        defaults = Limits()
        run(
            endpoints=options.endpoints,
            controller=options.controller,
            token_file=options.token_file,
            kept_file=options.kept_file,
            host=options.host,
            http_port=options.http_port,
            grpc_port=None if options.no_grpc else options.grpc_port,
            workers=options.workers,
            drain_timeout_s=options.drain_timeout_s,
            access_log=not options.no_access_log,
            keys=options.keys,
            auth=options.auth,
            limits=defaults.model_copy(update=_given_limits(options)),
        )
    except GatewayError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _given_limits(options: argparse.Namespace) -> dict[str, float]:
    given = {name: getattr(options, name, None) for name in Limits.model_fields}
    return {name: value for name, value in given.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--endpoints", type=Path, metavar="FILE", help="YAML list of endpoints")
    source.add_argument("--controller", metavar="URL", help="follow a cluster's controller")
    parser.add_argument("--token-file", type=Path, help="the controller's bearer token")
    parser.add_argument(
        "--kept-file", type=Path, help="the controller's last answer, for a restart"
    )
    parser.add_argument("--keys", type=Path, metavar="FILE", help="tenants and API keys")
    parser.add_argument(
        "--auth", choices=("none", "keys"), default="none", help="keys: from the controller"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=int, default=8000, help="0: any free port")
    parser.add_argument("--grpc-port", type=int, default=8001, help="0: any free port")
    parser.add_argument("--no-grpc", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the ports")
    parser.add_argument("--drain-timeout-s", type=float, default=30.0)
    parser.add_argument("--queue-timeout-s", type=float, help="wait while all replicas are busy")
    parser.add_argument("--hold-timeout-s", type=float, help="wait for a model that scales up")
    parser.add_argument("--max-queued", type=int, help="requests that wait, per model")
    parser.add_argument(
        "--prefill-min-tokens",
        type=int,
        help="that are read at prefill endpoints, if there are any",
    )
    parser.add_argument("--health-interval-s", type=float, help="0: no health checks")
    parser.add_argument("--max-body-bytes", type=int)
    parser.add_argument(
        "--max-arriving-bytes", type=int, help="of HTTP bodies, all of a worker's clients together"
    )
    parser.add_argument("--no-access-log", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
