"""How a cluster's node on a host is stopped, instead of by `ray stop`, which ends all Ray there."""

from __future__ import annotations

import logging
import shlex
import subprocess
from collections.abc import Mapping
from typing import Any

from ray.autoscaler._private.command_runner import SSHCommandRunner

from cluster.ssh import ssh_command

_GRACE_S = 60.0  # beside draining
_LAST_WORDS = 500

log = logging.getLogger(__name__)


def stop_command(config: Mapping[str, Any], cluster: str) -> str:
    """For a shell on the host. `config`: the provider's."""
    return (
        f"cd {config['folder']} && {config['python']} -m cluster.ray_node stop "
        f"--cluster {shlex.quote(cluster)} --drain-s {config['drain_s']}"
    )


def stop_host(host: str, config: Mapping[str, Any], cluster: str) -> bool:
    """Whether the host has answered that no process of the cluster is left there; else it is told."""
    ssh = config["ssh"]
    shell = f"bash --login -c {shlex.quote(stop_command(config, cluster))}"
    command = ssh_command(
        ssh["user"], host, shell, key=ssh["key"], proxy_command=ssh.get("proxy_command")
    )
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=config["drain_s"] + _GRACE_S,
        )
        said = done.stderr.decode(errors="replace").strip()[-_LAST_WORDS:]
        why = f"status {done.returncode}: {said}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        why = "it did not stop in time"
    except OSError as error:
        why = f"ssh: {error.strerror}"
    if why:
        log.warning(
            "%s could not be stopped (%s): processes of %s may still run there. `ray down` again "
            "once it answers",
            host,
            why,
            cluster,
        )
        return False
    log.info("%s: stopped", host)
    return True


class StoppingRunner(SSHCommandRunner):  # type: ignore[misc]  # Ray tells no types
    """Ray's own over ssh, in which `ray stop` (of `ray down`) is replaced."""

    def __init__(self, *args: Any, stop: str) -> None:
        super().__init__(*args)
        self._stop = stop

    def run(self, cmd: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As its base class."""
        return super().run(self._stop if cmd == "ray stop" else cmd, *args, **kwargs)
