"""Programs of Debian's that tests start: installed where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess

_PACKAGES = {
    "sshd": "openssh-server",
    "rsync": "rsync",
    "ip": "iproute2",
    "ps": "procps",
    "redis-server": "redis-server",
}


def install_missing(*programs: str) -> None:
    """All of them, unless some are named. As root."""
    missing = [_PACKAGES[each] for each in programs or _PACKAGES if not is_there(each)]
    if missing:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # starts nothing
        command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)


def is_there(program: str) -> bool:
    """Whether it is installed."""
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is not None
