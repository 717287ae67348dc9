"""The calibration file: kept beside the state of this user's clusters, read by the planner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.context import state_dir
from cluster.files import replace_text
from placement.calibration import Calibration
from placement.catalogue import Catalogue, load_catalogue
from placement.spec import dump_yaml, load_yaml

CALIBRATION_FILE = "calibration.yaml"


def calibration_path() -> Path:
    """Of this user."""
    return state_dir() / CALIBRATION_FILE


def calibrated_catalogue() -> Catalogue:
    """The catalogue, with what this user's engines were seen to need.

    Raises:
        ConfigError: a file of the catalogue, or the calibration file, is wrong.
    """
    return load_catalogue().with_calibration(load_calibration(calibration_path()))


def load_calibration(path: Path) -> Calibration:
    """What is in the file; nothing if there is none.

    Raises:
        ConfigError: it is not a calibration file.
    """
    return load_yaml(path, Calibration) if path.exists() else Calibration()


def update_calibration(path: Path, change: Callable[[Calibration], Calibration]) -> None:
    """Keep what `change` makes of the file, which is replaced in one step.

    Raises:
        ConfigError: the file is there and is not a calibration file; it is left as it is.
        OSError: it cannot be written.
    """
    replace_text(path, dump_yaml(change(load_calibration(path))))
