#!/bin/sh
# Pin every dependency of pyproject.toml, with hashes. torch is installed by a step of its own
# (install.sh), because its CPU build is not on PyPI.
set -eu
compile() {
    "$BIN/uv" pip compile pyproject.toml --quiet --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header \
        --no-emit-index-url --no-emit-find-links "$@" >/dev/null
}
# uv does not read pip's configuration: tell it where pip finds the CPU build of torch.
FIND_LINKS=${PIP_FIND_LINKS:+--find-links $PIP_FIND_LINKS}
CPU="--extra cpu --override requirements/overrides.txt --no-emit-package torch $FIND_LINKS"
compile $CPU --output-file requirements/cpu.txt
compile $CPU --extra dev --constraint requirements/cpu.txt --output-file requirements/dev.txt
compile --extra gpu --output-file requirements/gpu.txt
