"""Hosts for tests on one Linux machine: each its own network, process table, /tmp, home and sshd.

They hang on a switch that the first of them, the operator's, holds: nothing is added to the
machine's own network, and there is no way out. Files beside /tmp, /root, /run and /dev/shm are the
machine's. Everything ends with the first process of a host's process table. Needs root, iproute2,
util-linux, openssh-server and rsync.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

NET = "10.78.0"
OPERATOR = "operator"
_SWITCH = "switch"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CLONE_NEWNET = 0x40000000
_LOCK = Path("/var/tmp/bora-lab.lock")  # noqa: S108 - /tmp is hidden in the hosts

T = TypeVar("T")


@dataclass(slots=True)
class Host:
    """One host. `init` is its first process as this machine numbers it; 0 while it is off."""

    name: str
    address: str
    folder: Path
    namespace: str
    init: int = 0
    process: subprocess.Popen[bytes] | None = None


class Lab:
    """`names` get the addresses .1, .2 and so on; the first one is the operator's."""

    def __init__(self, folder: Path, names: Sequence[str], *, shown: Sequence[Path]) -> None:
        self._folder = folder
        self._shown = tuple(shown)
        self.hosts = {
            name: Host(name, f"{NET}.{number}", folder / name, f"bora{os.getpid()}-{number}")
            for number, name in enumerate((OPERATOR, *names), start=1)
        }

    def address(self, name: str) -> str:
        return self.hosts[name].address

    def up(self) -> None:
        """Cable and boot all."""
        key = self._folder / "key"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        for host in self.hosts.values():
            self._cable(host)
            self._furnish(host, key)
            self.boot(host.name)

    def down(self) -> None:
        """End what `up` started, and nothing else."""
        for host in reversed(self.hosts.values()):
            self.power_off(host.name)
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)

    def boot(self, name: str) -> None:
        """Switch a host on: an empty /tmp, the same home."""
        host = self.hosts[name]
        shutil.rmtree(host.folder / "tmp", ignore_errors=True)
        (host.folder / "tmp").mkdir()
        (host.folder / "sshd.log").unlink(missing_ok=True)
        (host.folder / "tmp").chmod(0o1777)
        script = host.folder / "init.sh"
        script.write_text(self._init(host))
        enter = ["ip", "netns", "exec", host.namespace, "unshare", "--mount", "--uts", "--ipc"]
        enter += ["--pid", "--fork", "--kill-child", "--mount-proc", "bash", str(script)]
        with (host.folder / "console").open("wb") as console:
            host.process = subprocess.Popen(
                enter,
                env={"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        host.init = self._wait_for_sshd(host)
        self._link(host, "up")

    def power_off(self, name: str) -> None:
        """As pulling the plug: the link goes first, so that nobody is told."""
        host = self.hosts[name]
        if host.process is None:
            return
        self._link(host, "down")
        host.process.kill()  # --kill-child: the kernel ends the whole process table with it
        host.process.wait(10)
        host.init, host.process = 0, None

    def unplug(self, name: str) -> None:
        """Cut its cable at the switch; the host goes on."""
        self._link(self.hosts[name], "down")

    def plug(self, name: str) -> None:
        """The cable works again."""
        self._link(self.hosts[name], "up")

    def part(self, one: str, other: str) -> None:
        """Let what these two send each other get lost; everybody else reaches both."""
        for here, there in ((one, other), (other, one)):
            nobody = ["lladdr", "02:00:00:00:00:01", "nud", "permanent"]
            _run(*self._neighbour(here, "replace"), self.address(there), *nobody, "dev", "eth0")

    def join(self, one: str, other: str) -> None:
        """They reach each other again."""
        for here, there in ((one, other), (other, one)):
            _run(*self._neighbour(here, "del"), self.address(there), "dev", "eth0")

    def _neighbour(self, name: str, action: str) -> list[str]:
        return ["ip", "-n", self.hosts[name].namespace, "neigh", action]

    def inside(self, name: str, work: Callable[[], T]) -> T:
        """What `work` returns, in a thread that is on that host's network, and only there."""
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(lambda: _entered(self.hosts[name], work)).result()

    def command(self, name: str, shell: str, env: Mapping[str, str] | None = None) -> list[str]:
        """What runs `shell` on a host."""
        host = self.hosts[name]
        enter = ["nsenter", "-t", str(host.init), "--mount", "--uts", "--ipc", "--net", "--pid"]
        plain = {"HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "TERM": "dumb", **(env or {})}
        variables = [f"{key}={value}" for key, value in plain.items()]
        return [*enter, "env", "-i", *variables, "bash", "--login", "-c", f"cd; {shell}"]

    def run(self, name: str, shell: str, *, timeout_s: float = 120.0) -> str:
        """Its output; fails with all of it when the command does."""
        done = subprocess.run(
            self.command(name, shell),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {shell}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
        return done.stdout

    def processes(self, name: str) -> list[str]:
        """Command lines of all that runs on a host, beside the first process and sshd."""
        lines = self.run(name, "ps -eo pid=,args=").splitlines()
        own = ("bash " + str(self._folder), "sshd", "ps -eo", "ps -eo", "sleep ")
        return [line for line in lines if not any(word in line for word in own)]

    def _cable(self, host: Host) -> None:
        _run("ip", "netns", "add", host.namespace)
        _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        switch, address = self.hosts[OPERATOR].namespace, f"{host.address}/24"
        if host.name == OPERATOR:
            _run("ip", "-n", switch, "link", "add", _SWITCH, "type", "bridge")
            _run("ip", "-n", switch, "addr", "add", address, "dev", _SWITCH)
            _run("ip", "-n", switch, "link", "set", _SWITCH, "up")
            return
        port = f"p{host.address.rpartition('.')[2]}"
        pair = ["type", "veth", "peer", "name", port, "netns", switch]
        _run("ip", "-n", host.namespace, "link", "add", "eth0", *pair)
        _run("ip", "-n", switch, "link", "set", port, "master", _SWITCH, "up")
        _run("ip", "-n", host.namespace, "addr", "add", address, "dev", "eth0")
        _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")

    def _link(self, host: Host, state: str) -> None:
        """At the switch, which goes on without the host."""
        if host.name != OPERATOR:
            port = f"p{host.address.rpartition('.')[2]}"
            command = ["ip", "-n", self.hosts[OPERATOR].namespace, "link", "set", port, state]
            subprocess.run(command, check=False, capture_output=True)

    def _furnish(self, host: Host, key: Path) -> None:
        """Home and configuration files; only the operator holds the key."""
        for folder in ("root/.ssh", "etc"):
            (host.folder / folder).mkdir(parents=True)
        (host.folder / "root").chmod(0o700)
        (host.folder / "root" / ".ssh").chmod(0o700)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.folder / "etc/host_key"))
        shutil.copy(key.with_suffix(".pub"), host.folder / "root/.ssh/authorized_keys")
        if host.name == OPERATOR:
            shutil.copy(key, host.folder / "root/.ssh/lab_key")
        names = "".join(f"{each.address} {each.name}\n" for each in self.hosts.values())
        files = {
            "hosts": f"127.0.0.1 localhost\n{names}",
            "hostname": f"{host.name}\n",
            "resolv.conf": "",
            "sshd_config": textwrap.dedent(f"""\
                ListenAddress {host.address}
                HostKey {host.folder}/etc/host_key
                PermitRootLogin prohibit-password
                PasswordAuthentication no
                UsePAM no
                UseDNS no
                PidFile none
                MaxStartups 50
                Subsystem sftp internal-sftp
                """),
        }
        for name, text in files.items():
            (host.folder / "etc" / name).write_text(text)

    def _init(self, host: Host) -> str:
        """The first process: lays the private folders over the machine's, then minds orphans."""
        base = host.folder
        lines = ["set -e", "mount --make-rprivate /"]
        for path in self._shown:
            inside = next((top for top in ("tmp", "root") if path.is_relative_to(f"/{top}")), None)
            if inside is not None:
                place = shlex.quote(str(base / str(path)[1:]))
                lines += [f"mkdir -p {place}", f"mount --bind {path} {place}"]
                lines += [f"mount -o remount,bind,ro {place}"]
        lines += [f"mount --bind {base}/etc/{name} /etc/{name}" for name in
                  ("hosts", "hostname", "resolv.conf")]  # fmt: skip
        lines += [
            "mount -t tmpfs -o mode=755,size=16m tmpfs /run",
            "mount -t tmpfs -o mode=1777,size=512m tmpfs /dev/shm",
            "mkdir -p /run/sshd",
            f"mount --rbind {base}/tmp /tmp",  # noqa: S108
            f"mount --rbind {base}/root /root",
            f"hostname {host.name}",
            "cd /root",
            f"/usr/sbin/sshd -D -e -f {base}/etc/sshd_config 2>{base}/sshd.log &",
            "while :; do wait -n || sleep 1; done",
        ]
        return "\n".join(lines) + "\n"

    def _wait_for_sshd(self, host: Host) -> int:
        """The first process's id, once the host can be logged into."""
        assert host.process is not None
        log = host.folder / "sshd.log"
        children = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and host.process.poll() is None:
            if log.exists() and "Server listening" in log.read_text():
                return int(children.read_text().split()[0])
            time.sleep(0.05)
        raise AssertionError(f"{host.name}: {(host.folder / 'console').read_text()}")


@contextlib.contextmanager
def running_lab(*names: str, shown: Sequence[Path]) -> Iterator[Lab]:
    """Hosts that see `shown` (read-only) where these folders are; one lab at a time."""
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = Path(tempfile.mkdtemp(prefix="bora-lab-", dir="/var/tmp"))
        base = Path(sys.base_prefix)
        lab = Lab(folder, names, shown=[Path(sys.prefix), base, *shown])
        try:
            lab.up()
            yield lab
        finally:
            lab.down()
            shutil.rmtree(folder, ignore_errors=True)


def _entered(host: Host, work: Callable[[], T]) -> T:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{host.init}/ns/net").open("rb") as network:
        if libc.setns(network.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network of {host.name}")
    return work()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
