"""requirements/install.sh with a Python that only says what it was asked to do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = """#!/bin/sh
echo "$@" >> "{log}"
if [ "$1 $2" = "-m venv" ]; then
    for folder; do :; done
    case "$*" in *--clear*) rm -rf "$folder";; esac
    mkdir -p "$folder/bin"
    rm -f "$folder/bin/python"
    ln -s "{python}" "$folder/bin/python"
fi
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON.format(log=tmp_path / "log", python=path))
    path.chmod(0o755)
    return path


def installed(tmp_path: Path, python: Path) -> list[str]:
    """The environments that were made."""
    subprocess.run(
        ["sh", "requirements/install.sh"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": str(python), "VENV": str(tmp_path / "venv")},
        capture_output=True,
        check=True,
    )
    asked = (tmp_path / "log").read_text().splitlines()
    return [line for line in asked if line.startswith("-m venv")]


def test_an_environment_that_works_is_kept(tmp_path: Path, python: Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(python)

    assert installed(tmp_path, python) == []


def test_a_half_made_environment_is_made_anew(tmp_path: Path, python: Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(tmp_path / "gone")
    (tmp_path / "venv" / "bin" / "pip").touch(mode=0o755)

    assert installed(tmp_path, python) == [f"-m venv --clear {tmp_path / 'venv'}"]


def test_a_folder_that_is_no_environment_is_not_emptied(tmp_path: Path, python: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").touch()

    assert installed(tmp_path, python) == [f"-m venv {tmp_path / 'venv'}"]
    assert (tmp_path / "venv" / "thesis.txt").exists()
