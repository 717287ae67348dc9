"""Two gangs of a host meet at ports of their own, however late their engines listen there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.claimed_ports import claim_ports

CLAIM = """
import sys
from pathlib import Path
from cluster.claimed_ports import claim_ports
claimed = claim_ports(2, "127.0.0.1", Path(sys.argv[1]), lambda count, host: [20001, 20002][:count])
print(*claimed.ports, flush=True)
sys.stdin.read()
"""


def test_a_port_is_given_to_nobody_else_while_its_holder_lives(tmp_path: Path):
    rounds = iter([[20001, 20003], [20002], [20004]])
    asked: list[int] = []

    def free(count: int, host: str) -> list[int]:
        asked.append(count)
        return next(rounds)

    with subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "20001 20002\n"

        ours = claim_ports(2, "127.0.0.1", tmp_path, free)
        assert ours.ports == (20003, 20004)
        assert asked == [2, 1, 1]
        assert other.stdin is not None
        other.stdin.close()

    again = claim_ports(1, "127.0.0.1", tmp_path, lambda count, host: [20001])
    assert again.ports == (20001,)
    for claimed in (ours, again):
        claimed.let_go()


def test_ports_that_were_let_go_are_given_again(tmp_path: Path):
    first = claim_ports(1, "127.0.0.1", tmp_path)
    first.let_go()

    second = claim_ports(1, "127.0.0.1", tmp_path, lambda count, host: list(first.ports))

    assert second.ports == first.ports
    second.let_go()
