"""A follower's share of a vLLM engine that spans several nodes: no HTTP server, only ranks.

    python -m cluster.engines.vllm_follower --headless --node-rank 1 ... (flags of `vllm serve`)

vLLM's own console script does the same, but reads the version of a distribution called `vllm`,
which its CPU build is not.
"""

from __future__ import annotations

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Run until the leader says so, or a rank of this node ends."""
    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args()
    arguments.model_tag = None  # `--model` has it
    validate_parsed_serve_args(arguments)
    ServeSubcommand.cmd(arguments)


if __name__ == "__main__":
    main()
