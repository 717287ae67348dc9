"""Print predicted against measured: `python -m tests.accuracy [FILE.csv]`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.accuracy.folds import speed_report
from tests.accuracy.judge import judge
from tests.accuracy.llamacpp_speed import llamacpp_report
from tests.accuracy.max_throughput import max_throughput_report
from tests.accuracy.other_gpus import other_gpus_report
from tests.accuracy.report import report
from tests.accuracy.rows import MEASUREMENTS, read_rows
from tests.accuracy.rtx4090 import rtx4090_report


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else MEASUREMENTS
    lines = [
        *report([judge(row) for row in read_rows(path)]),
        *speed_report(),
        *other_gpus_report(),
        *rtx4090_report(),
        *llamacpp_report(),
        *max_throughput_report(),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
