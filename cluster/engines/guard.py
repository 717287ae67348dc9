"""Run a command so that nothing of it outlives the one who asked for it.

    python -I guard.py [--grace-s S] [--log FILE] -- COMMAND...

The command and whatever it starts end when the guard's standard input closes (the parent ended,
however it did), when the guard gets SIGTERM, or when the command's own process ends. As a child
subreaper the guard adopts orphans, so that a daemon that left its session is found too.
Stands alone on the standard library: it is started by path, before anything else is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Guard the command until it ends or must end; the exit status is the command's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--grace-s", type=float, default=10.0, help="between SIGTERM and SIGKILL")
    parser.add_argument("--log", type=Path, help="append the command's output here")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wakeup = _wake_on_signals(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    child = _start(command, options.log, libc)
    status = _wait(child, wakeup)
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM)
        status = _wait_until(child, time.monotonic() + options.grace_s)
    _kill_descendants()
    return 128 + signal.SIGKILL if status is None else status


def _start(command: list[str], log: Path | None, libc: ctypes.CDLL) -> subprocess.Popen[bytes]:
    output = log.open("ab") if log else None
    # Should the guard itself be killed, the kernel ends the command. Safe in preexec_fn, since
    # this process has one thread.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509
    )


def _wake_on_signals(*signals: signal.Signals) -> int:
    """A file descriptor that receives the number of each of these signals as a byte."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    for number in signals:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write_end)
    return read_end


def _wait(child: subprocess.Popen[bytes], wakeup: int) -> int | None:
    """The command's exit status, or None when it must be ended."""
    while True:
        ready, _, _ = select.select([sys.stdin.fileno(), wakeup], [], [])
        if wakeup in ready:
            numbers = os.read(wakeup, 256)
            status = _reap(child)
            if status is not None:
                return status
            if any(number != signal.SIGCHLD for number in numbers):
                return None
        elif not os.read(sys.stdin.fileno(), 256):
            return None


def _wait_until(child: subprocess.Popen[bytes], deadline: float) -> int | None:
    while time.monotonic() < deadline:
        status = _reap(child)
        if status is not None:
            return status
        time.sleep(0.02)
    return None


def _reap(child: subprocess.Popen[bytes]) -> int | None:
    """Collect ended processes; the command's exit status if it is among them."""
    status = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(wait_status)
            status = code if code >= 0 else 128 - code


def _kill_descendants() -> None:
    """SIGKILL until no descendant is left; those that fork meanwhile are found in the next round."""
    while pids := _descendants(os.getpid()):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name, in parentheses, may hold spaces: count fields from its end.
                text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                parent = int(text.rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    queue = [root]
    while queue:
        queue += (below := children.get(queue.pop(), []))
        found += below
    return found


if __name__ == "__main__":
    sys.exit(main())
