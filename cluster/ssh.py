"""ssh to hosts of a cluster file, as Ray's own launcher does it: without questions, no host keys."""

from __future__ import annotations

from pathlib import Path

_CONNECT_S = 5


def ssh_command(
    user: str,
    host: str,
    command: str,
    *,
    key: str | None = None,
    port: int | None = None,
    proxy_command: str | None = None,
) -> list[str]:
    """What runs `command` there. `key`: a path; `port` None: as ~/.ssh/config has it."""
    options = ["BatchMode=yes", f"ConnectTimeout={_CONNECT_S}", "LogLevel=ERROR"]
    options += ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
    options += [f"ProxyCommand={proxy_command}"] if proxy_command else []
    arguments = [part for option in options for part in ("-o", option)]
    arguments += ["-i", str(Path(key).expanduser())] if key else []
    arguments += ["-p", str(port)] if port is not None else []
    return ["ssh", *arguments, f"{user}@{host}", command]
