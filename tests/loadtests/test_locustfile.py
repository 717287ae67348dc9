import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loadtests

LOCUSTFILE = Path(loadtests.__file__).with_name("locustfile.py")
# Ends the run after so many answers, however long they take.
ENOUGH = """
import itertools
import gevent
from locust import events

@events.init.add_listener
def watch(environment, **_):
    answers = itertools.count(1)

    def count(request_type, **_):
        if request_type == "POST" and next(answers) == 40:
            gevent.spawn(environment.runner.quit)

    environment.events.request.add_listener(count)
"""


@contextmanager
def simulated_engine(*flags: str) -> Iterator[str]:
    command = [sys.executable, "-m", "cluster.engines.sim_server", "--model", "chat", "--port", "0"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        log = iter(process.stdout)
        try:
            yield next(found[0] for line in log if (found := re.search(r"http://\S+", line)))
        finally:
            process.terminate()


def locust(
    folder: Path, host: str, *options: str
) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    """Exit status, and the rows of the report by request type and name."""
    (enough := folder / "enough.py").write_text(ENOUGH)
    files = f"{LOCUSTFILE},{enough}"
    command = [sys.executable, "-m", "locust", "-f", files, "--headless", "--json"]
    load = ["-u", "4", "-r", "4", "-t", "300s", "--host", host]
    done = subprocess.run([*command, *load, *options], capture_output=True, text=True, check=False)
    rows = json.loads(done.stdout)
    return done.returncode, {(row["method"], row["name"]): row for row in rows}


def test_users_measure_ttft_and_itl_and_nothing_fails(tmp_path: Path) -> None:
    with simulated_engine("--speed", "5") as host:
        status, rows = locust(tmp_path, host, "--stream-share", "0.5", "--max-tokens", "12")

    assert status == 0
    assert sum(row["num_failures"] for row in rows.values()) == 0
    streams = rows["POST", "/v1/chat/completions (stream)"]
    ttft = rows["TTFT", "/v1/chat/completions"]
    itl = rows["ITL", "/v1/chat/completions"]
    assert ttft["num_requests"] >= streams["num_requests"] > 0
    assert itl["num_requests"] > ttft["num_requests"]
    assert ttft["total_response_time"] < streams["total_response_time"]
    assert rows["POST", "/v1/chat/completions"]["num_requests"] > 0
    assert rows["GET", "/v1/models"]["num_requests"] == 4


def test_refused_requests_are_failures(tmp_path: Path) -> None:
    with simulated_engine() as host:
        status, rows = locust(tmp_path, host, "--model", "other")

    assert status == 1
    assert all(row["num_failures"] == row["num_requests"] > 0 for row in rows.values())
