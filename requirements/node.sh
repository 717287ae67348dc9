#!/bin/sh
# bora on a node of a cluster, from the lock file: sh requirements/node.sh gpu|cpu
# Run in the folder of the code. Installs nothing when this lock file is installed already.
set -eu
KIND=$1
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
LOCK=requirements/$KIND.txt
STAMP=$VENV/installed-$KIND-$(cat "$LOCK" pyproject.toml | sha256sum | cut -c1-16)

[ -e "$STAMP" ] && exit 0
if [ "$KIND" = cpu ]; then
    PYTHON="$PYTHON" VENV="$VENV" sh requirements/install.sh
else
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "bora needs Python 3.11 or newer on every node; set PYTHON" >&2
        exit 1
    }
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip --disable-pip-version-check -qq install --require-hashes -r "$LOCK"
    "$VENV/bin/python" -m pip --disable-pip-version-check -qq install hatchling editables
    "$VENV/bin/python" -m pip --disable-pip-version-check -qq install \
        --no-deps --no-build-isolation --editable .
fi
touch "$STAMP"
