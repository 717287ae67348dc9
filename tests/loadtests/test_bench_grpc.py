"""The gRPC benchmark in small: every gateway that it compares answers its load."""

from __future__ import annotations

import re

import pytest

from loadtests import bench_grpc


def test_every_contender_answers_calls_and_streams(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_grpc.main(["--rounds", "1", "--seconds", "0.2"]) == 0

    rows = re.findall(
        r"^\| (pass-through|bora|bora-oip) \| (\d+) \|", capsys.readouterr().out, re.MULTILINE
    )
    assert [name for name, _ in rows] == ["pass-through", "bora", "bora-oip"]
    assert all(int(cost) > 0 for _, cost in rows)
