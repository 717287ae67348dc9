"""The reference of the YAML files is what the code says."""

from __future__ import annotations

from cluster.reference import FILES, reference
from placement.catalogue import CONFIGS


def test_the_reference_is_up_to_date():
    shipped = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert shipped == reference(), "run `make docs`"


def test_every_key_of_a_fleet_file_is_explained():
    fleet = reference().split("## ")[1]
    unexplained = [line for line in fleet.splitlines() if line.startswith("| `") and "|  |" in line]
    assert unexplained == []
    assert len(FILES) == 8
