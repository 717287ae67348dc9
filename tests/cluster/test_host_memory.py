from pathlib import Path

import psutil

from cluster.host_memory import available_bytes, limits_bytes


def test_without_control_groups_it_is_what_the_machine_has_left(tmp_path: Path) -> None:
    available = available_bytes(tmp_path)

    assert 0 < available <= psutil.virtual_memory().total


def test_a_group_with_a_limit_leaves_less(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 100000\n")

    assert available_bytes(tmp_path) == 400_000


def test_a_group_without_a_limit_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")

    assert available_bytes(tmp_path) > 700_000


def test_the_limits_of_all_groups_count(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")

    assert limits_bytes(tmp_path) == [1_000_000]
