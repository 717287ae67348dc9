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
exec 9<"$LOCK" # of two at once the second waits, and then finds all done
flock 9
[ -e "$STAMP" ] && exit 0
rm -f "$VENV"/installed-* # of what is about to be replaced, or it would pass for installed later
if [ "$KIND" = cpu ]; then
    PYTHON="$PYTHON" VENV="$VENV" sh requirements/install.sh
else
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "bora needs Python 3.11 or newer on every node; set PYTHON" >&2
        exit 1
    }
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        # One that was half-made is made anew; another folder of that name is not emptied.
        CLEAR=
        if [ -e "$VENV/pyvenv.cfg" ] || [ -L "$VENV/bin/python" ]; then CLEAR=--clear; fi
        "$PYTHON" -m venv $CLEAR "$VENV"
    fi
    "$VENV/bin/python" -m pip --disable-pip-version-check -qq install --require-hashes -r "$LOCK"
    "$VENV/bin/python" -m pip --disable-pip-version-check -qq install hatchling editables
    "$VENV/bin/python" -m pip --disable-pip-version-check -qq install \
        --no-deps --no-build-isolation --editable .
fi
touch "$STAMP"
